"""The demo data: equal seeds give equal bytes; personal and learnable, with nothing given away by popularity."""

from collections import Counter
from pathlib import Path

from trsr_dist.config import load_config
from trsr_dist.data.demo import TOPICS, make_items, write_demo
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.run import RunFolder

CHANCE = 5 / 21
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def recall_at_5(row: UserRow, scores: list[float]) -> float:
    """Expected over random orders of ties."""
    target = scores[row.labels.index(1)]
    above = sum(s > target for s in scores)
    ties = sum(s == target for s in scores)
    return min(max(5 - above, 0), ties) / ties


def demo_store(tmp_path: Path, users: int) -> HistoryStore:
    config = load_config(CONFIG, [f"run.dir={tmp_path}", f"demo.num_users={users}", "data.split=[1,1,4]"])
    prepare(config)
    return HistoryStore(RunFolder(tmp_path).histories)


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_demo(tmp_path / name, 30, 100, seed)
    for file in ("news.tsv", "behaviors.tsv"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_no_word_stands_in_two_topics() -> None:
    words = Counter(word for topic in TOPICS for word in (topic.name, *topic.words))
    words.update({topic.category for topic in TOPICS})
    assert len(TOPICS) >= 10
    assert max(words.values()) == 1


def test_titles_differ() -> None:
    titles = [item.title for item in make_items(2000, seed=0)]
    assert len(set(titles)) == len(titles)


def test_only_the_users_own_history_tells(tmp_path: Path) -> None:
    store = demo_store(tmp_path, 1200)
    catalogue, rows = store.catalogue, [store.user("test", i) for i in range(store.num_users("test"))]
    popularity = catalogue.column("popularity")
    topic = [catalogue.text(i).split("; title")[0] for i in range(len(catalogue))]

    def by_topic(row: UserRow, history: list[int]) -> float:
        seen = Counter(topic[item] for item in history[-10:])
        return recall_at_5(row, [seen[topic[item]] for item in row.candidates])

    own = sum(by_topic(row, row.history) for row in rows) / len(rows)
    other = sum(by_topic(row, rows[i - 1].history) for i, row in enumerate(rows)) / len(rows)
    popular = sum(recall_at_5(row, [popularity[i] for i in row.candidates]) for row in rows) / len(rows)
    assert own > 0.75
    assert abs(other - CHANCE) < 0.06
    assert abs(popular - CHANCE) < 0.06
