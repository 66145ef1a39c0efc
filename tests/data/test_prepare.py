"""The preparation job on every format: what ends up in the store, and reruns."""

from pathlib import Path

import pytest

from tests.data.raw import (
    LENGTH,
    NUM_ITEMS,
    behavior_line,
    clicks,
    make_config,
    user_records,
    write_amazon,
    write_jsonl,
    write_mind,
)
from tests.kills import check_stage
from trsr_dist.data.logs import KnownUser
from trsr_dist.data.prepare import prepare
from trsr_dist.data.samples import earlier_samples, with_more_targets
from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError, RunError
from trsr_dist.files import read_json
from trsr_dist.hashing import hash64
from trsr_dist.run import SPLITS


def run(folder: Path, data_format: str, *overrides: str) -> HistoryStore:
    assert prepare(make_config(folder, data_format, *overrides)) == 0
    return HistoryStore(folder / "run" / "histories")


def users_of(store: HistoryStore) -> dict[str, tuple[str, UserRow]]:
    rows = [(split, store.user(split, i)) for split in SPLITS for i in range(store.num_users(split))]
    return {row.user: (split, row) for split, row in rows}


def ids(store: HistoryStore, rows: list[int]) -> list[str]:
    return [store.catalogue.id(row) for row in rows]


def manifest(folder: Path) -> dict:
    return read_json(folder / "run" / "histories" / "manifest.json")


def test_mind_keeps_the_last_click_as_target(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    with open(raw / "behaviors.tsv", "a") as stream:
        stream.write(behavior_line(0, clicks(3)))
    store = run(tmp_path, "mind")
    users = users_of(store)
    assert len(users) == 24
    for i in range(24):
        split, row = users[f"U{i}"]
        assert ids(store, row.history) == clicks(i)[:-1]
        assert [c for c, label in zip(ids(store, row.candidates), row.labels, strict=True) if label] == clicks(i)[-1:]
        assert len(row.candidates) == (7 if split == "train" else 6)
        assert not set(row.candidates) & set(row.history)
        assert len(set(row.candidates)) == len(row.candidates)
    assert store.catalogue.text(4) == "category: cat1; subcategory: sub4; title: Title number 4"
    assert store.catalogue.item(4).category == "cat1"
    counts = manifest(tmp_path)["counts"]
    assert counts["further_rows_of_a_user"] == 1
    assert counts["items_with_normalized_white_space"] == NUM_ITEMS
    assert users["U7"][1].time == 1573451587


def test_popularity_counts_the_clicks_of_train_users(tmp_path: Path) -> None:
    write_mind(tmp_path)
    store = run(tmp_path, "mind")
    train = [row for split, row in users_of(store).values() if split == "train"]
    own = [item for row in train for item in [*row.history, row.candidates[0]]]
    assert store.catalogue.column("popularity").tolist() == [own.count(item) for item in range(len(store.catalogue))]


def test_users_stand_in_hash_order_and_stay_where_they_are_when_users_are_added(tmp_path: Path) -> None:
    write_mind(tmp_path / "few", users=20)
    write_mind(tmp_path / "many", users=40)
    few, many = run(tmp_path / "few", "mind"), run(tmp_path / "many", "mind")
    for split in SPLITS:
        keys = [hash64(many.user(split, i).user) for i in range(many.num_users(split))]
        assert keys == sorted(keys)
    more = users_of(many)
    for user, (split, row) in users_of(few).items():
        assert more[user] == (split, row)


def test_held_out_candidates_are_shuffled_and_hashed(tmp_path: Path) -> None:
    write_mind(tmp_path, users=60)
    store = run(tmp_path, "mind", "data.split=[1,0,9]")
    places = {store.user("test", i).labels.index(1) for i in range(store.num_users("test"))}
    assert len(places) > 3
    first = manifest(tmp_path)["splits"]["test"]["candidate_hash"]
    prepare(make_config(tmp_path, "mind", "data.split=[1,0,9]", "run.seed=1"), force=True)
    assert manifest(tmp_path)["splits"]["test"]["candidate_hash"] != first


def test_clicked_impressions_as_targets(tmp_path: Path) -> None:
    write_mind(tmp_path)
    store = run(tmp_path, "mind", "data.target=impression", "data.candidates=impressions")
    for user, (_, row) in users_of(store).items():
        assert ids(store, row.history) == clicks(int(user[1:]))
        candidates = dict(zip(ids(store, row.candidates), row.labels, strict=True))
        assert all(int(item[1:]) >= 40 for item, label in candidates.items() if not label)
        assert [int(item[1:]) < 40 for item, label in candidates.items() if label] == [True]


def test_amazon_sessions_of_one_locale(tmp_path: Path) -> None:
    write_amazon(tmp_path)
    store = run(tmp_path, "amazon_m2", "data.locale=UK")
    users = users_of(store)
    assert len(users) == 18
    assert len(store.catalogue) == NUM_ITEMS
    assert store.catalogue.text(3) == (
        'title: Lamp, no 3; price: 3.5; brand: Brand3; desc: First line second "line" 3'
    )  # fmt: skip
    histories = {tuple(ids(store, row.history)) for _, row in users.values()}
    assert histories == {tuple(clicks(i)[:-1]) for i in range(24) if i % 4}
    counts = manifest(tmp_path)["counts"]
    assert (counts["products_of_other_locales"], counts["sessions_of_other_locales"]) == (NUM_ITEMS, 6)


def test_amazon_all_locales_keep_equal_ids_apart(tmp_path: Path) -> None:
    raw = write_amazon(tmp_path)
    lines = (raw / "sessions_train.csv").read_text()
    (raw / "sessions_train.csv").write_text(lines + lines.partition("locale\n")[2])
    store = run(tmp_path, "amazon_m2")
    assert len(store.catalogue) == 2 * NUM_ITEMS
    assert store.catalogue.id(1) == "DE:N0"
    assert len(users_of(store)) == 24
    assert manifest(tmp_path)["counts"]["equal_sessions"] == 24


@pytest.mark.parametrize("strategy", ["uniform", "popularity", "targets"])
def test_amazon_negatives_speak_the_targets_language(tmp_path: Path, strategy: str) -> None:
    write_amazon(tmp_path, users=120)
    store = run(tmp_path, "amazon_m2", f"data.candidates={strategy}")
    assert store.within_category
    lists = [{item[:3] for item in ids(store, row.candidates)} for _, row in users_of(store).values()]
    assert {tuple(one) for one in lists} == {("UK:",), ("DE:",)}


def test_both_json_forms_give_the_same_users(tmp_path: Path) -> None:
    records = user_records()
    single = [
        {"user": record["user"], "item": item, "time": record["time"] - LENGTH + 1 + place}
        for place in reversed(range(LENGTH))
        for record in records
        for item in [[*record["history"], record["target"]][place]]
    ]
    write_jsonl(tmp_path / "users", records)
    write_jsonl(tmp_path / "single", single)
    by_user, by_row = run(tmp_path / "users", "jsonl"), run(tmp_path / "single", "jsonl")
    assert users_of(by_user) == users_of(by_row)
    assert by_user.catalogue.text(2) == "Thing 2"


def test_json_fields_times_and_shown_items(tmp_path: Path) -> None:
    items = [{"id": i, "title": f" A\n{i}", "tags": ["x", 2], "none": None} for i in range(NUM_ITEMS)]
    records = [
        {"user": i, "history": [i, i + 1], "target": [i + 2, i + 3], "time": time}
        for i, time in enumerate(["2024-01-02T03:04:05", "1704164645", 1704164645, "20240102"] * 5)
    ]
    write_jsonl(tmp_path, records, items)
    store = run(tmp_path, "jsonl")
    assert store.catalogue.text(7) == "title: A 7; tags: x, 2"
    split, row = users_of(store)["4"]
    assert [users_of(store)[user][1].time for user in "0123"] == [1704164645] * 3 + [1704153600]
    assert sum(row.labels) == 2
    assert len(row.labels) == (8 if split == "train" else 12)


def test_chosen_fields_in_their_order(tmp_path: Path) -> None:
    write_mind(tmp_path)
    store = run(tmp_path, "mind", "data.item_fields=[title,abstract]")
    assert store.catalogue.text(0) == "title: Title number 0; abstract: Abstract 0"


def test_rerun_does_nothing_and_force_redoes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mind(tmp_path)
    run(tmp_path, "mind")
    path = tmp_path / "run" / "histories" / "train.arrow"
    before, content = path.stat().st_ino, path.read_bytes()
    capsys.readouterr()
    run(tmp_path, "mind")
    assert "nothing to do" in capsys.readouterr().out
    assert path.stat().st_ino == before
    prepare(make_config(tmp_path, "mind"), force=True)
    assert path.stat().st_ino != before
    assert path.read_bytes() == content
    assert (tmp_path / "run" / "config" / "prepare.yaml").is_file()


def test_killed_at_every_change_while_it_is_redone(tmp_path: Path) -> None:
    write_mind(tmp_path)
    old, new = make_config(tmp_path, "mind"), make_config(tmp_path, "mind", "run.seed=1")
    run = tmp_path / "run"
    check_stage(
        run / "histories",
        lambda: prepare(old),
        lambda: prepare(new, force=True),
        lambda: prepare(old, force=True),
    )
    assert sorted(path.name for path in run.iterdir()) == ["config", "histories"]


def test_a_missing_config_is_written_again(tmp_path: Path) -> None:
    write_mind(tmp_path)
    run(tmp_path, "mind")
    path = tmp_path / "run" / "config" / "prepare.yaml"
    before = path.read_text()
    path.unlink()
    run(tmp_path, "mind")
    assert path.read_text() == before


def test_changed_settings_or_input_are_refused(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    run(tmp_path, "mind")
    with pytest.raises(RunError, match="min_history"):
        run(tmp_path, "mind", "data.min_history=2")
    (raw / "news.tsv").write_text((raw / "news.tsv").read_text() + "N99\ta\tb\tc\td\te\tf\tg\n")
    with pytest.raises(RunError, match=r"news\.tsv"):
        run(tmp_path, "mind")


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    write_mind(tmp_path)
    other = tmp_path / "run" / "histories" / "thesis.txt"
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    with pytest.raises(RunError, match="not this run's"):
        run(tmp_path, "mind")
    assert other.read_text() == "precious"


def test_dry_run_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data_format in ("mind", "demo"):
        prepare(make_config(tmp_path, data_format), dry_run=True)
    out = capsys.readouterr().out
    assert "MISSING" in out
    assert "# write and read" in out
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_train_users_may_have_several_targets(tmp_path: Path) -> None:
    """The history ends before them; held-out users, orders and click counts stay as they are."""
    write_mind(tmp_path)
    assert prepare(make_config(tmp_path, "mind", f"run.dir={tmp_path / 'single'}")) == 0
    single = HistoryStore(tmp_path / "single" / "histories")
    store = run(tmp_path, "mind", "data.train_targets=3", "data.min_history=3", "train.negatives_per_positive=2")
    for user, (split, row) in users_of(store).items():
        own, num_targets = clicks(int(user[1:])), 3 if split == "train" else 1
        assert ids(store, row.history) == own[:-num_targets]
        assert [c for c, label in zip(ids(store, row.candidates), row.labels, strict=True) if label] == (
            own[-num_targets:]
        )
        assert len(row.candidates) == num_targets + (6 if split == "train" else 5)
    assert [list(found) for found in store.sequences("train", 50)] == [
        list(found) for found in single.sequences("train", 50)
    ]
    assert list(store.catalogue.column("popularity")) == list(single.catalogue.column("popularity"))


@pytest.mark.parametrize("strategy", ["uniform", "targets", "popularity"])
def test_train_users_may_have_earlier_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    """Each reads what came before its targets, and no item of the user is a negative; nothing else changes."""
    write_mind(tmp_path)
    shared = ["data.train_targets=2", "data.min_history=1", f"data.candidates={strategy}", "train.pool_size=8"]
    assert prepare(make_config(tmp_path, "mind", *shared, f"run.dir={tmp_path / 'single'}")) == 0
    single = HistoryStore(tmp_path / "single" / "histories")
    store = run(tmp_path, "mind", *shared, "data.train_prefixes=3")
    assert f"items, samples train {3 * single.num_users('train')} / " in capsys.readouterr().out
    users = users_of(store)
    train = [user for user, (split, _) in users_of(single).items() if split == "train"]
    assert users.keys() - users_of(single).keys() == {f"{user}~{number}" for user in train for number in (1, 2)}
    for user in train:
        own = clicks(int(user[1:]))
        for name, start, stop in ((user, 4, 6), (f"{user}~1", 2, 4), (f"{user}~2", 1, 2)):
            split, row = users[name]
            assert split == "train" and row.time == users[user][1].time
            assert ids(store, row.history) == own[:start]
            assert ids(store, row.candidates[: sum(row.labels)]) == own[start:stop]
            assert not {*ids(store, row.candidates[sum(row.labels) :])} & {*own}
    for split in SPLITS:
        ours, theirs = (sorted(map(list, found.sequences(split, 50))) for found in (store, single))
        assert ours == theirs
        for column in ("history", "targets"):
            assert store.count_items(split, column).tolist() == single.count_items(split, column).tolist()
    assert [users[user] for split in ("valid", "test") for user in single.names(split)] == [
        (split, single.user(split, i)) for split in ("valid", "test") for i in range(single.num_users(split))
    ]
    for column in ("popularity", "first_seen"):
        assert store.catalogue.column(column).tolist() == single.catalogue.column(column).tolist()


@pytest.mark.parametrize("more", ["data.train_targets=3", "data.train_prefixes=3"])
def test_clicks_of_items_met_again_count_however_many_targets_there_are(tmp_path: Path, more: str) -> None:
    records = [{**row, "history": [*row["history"], row["history"][0]]} for row in user_records()]
    write_jsonl(tmp_path, records)
    assert prepare(make_config(tmp_path, "jsonl", f"run.dir={tmp_path / 'single'}")) == 0
    single, store = HistoryStore(tmp_path / "single" / "histories"), run(tmp_path, "jsonl", more)
    for column in ("popularity", "first_seen"):
        assert store.catalogue.column(column).tolist() == single.catalogue.column(column).tolist()


def test_users_whose_batch_holds_earlier_samples_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mind(tmp_path)
    monkeypatch.setattr("trsr_dist.data.store.ROWS_PER_BATCH", 1)
    store = run(tmp_path, "mind", "data.train_prefixes=2")
    found = store.sequences("train", 50)
    assert len(found) == store.num_users("train") / 2 and min(map(len, found)) > 1


def test_a_key_like_that_of_an_earlier_sample(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    log = raw / "behaviors.tsv"
    log.write_text(log.read_text().replace("\tU3\t", "\tU3~1\t"))
    with pytest.raises(DataError, match=r"user 'U3~1'.*data.train_prefixes"):
        run(tmp_path, "mind", "data.train_prefixes=2")
    store = run(tmp_path, "mind")
    assert "U3~1" in users_of(store) and len(store.sequences("train", 9)) == store.num_users("train")


@pytest.mark.parametrize(
    ("history", "num_samples", "num_targets", "min_history", "expected"),
    [
        ([1, 2, 3, 4], 0, 1, 1, []),
        ([1, 2, 3, 4], 2, 1, 1, [([1, 2, 3], [4]), ([1, 2], [3])]),
        ([1, 2, 3, 4], 9, 1, 3, [([1, 2, 3], [4])]),
        ([1, 2, 3, 4], 9, 2, 1, [([1, 2], [3, 4]), ([1], [2])]),
        ([1, 2, 1, 1], 9, 2, 1, [([1], [2])]),
        ([1], 9, 2, 0, []),
    ],
)
def test_earlier_samples(
    history: list[int], num_samples: int, num_targets: int, min_history: int, expected: list
) -> None:
    found = earlier_samples(KnownUser("u", history, [9], 5, []), num_samples, num_targets, min_history)
    assert [(user.history, user.targets) for user in found] == expected
    assert [user.user for user in found] == [f"u~{number}" for number in range(1, 1 + len(found))]


@pytest.mark.parametrize(
    ("history", "targets", "num_targets", "min_history", "expected"),
    [
        ([1, 2, 3, 4], [9], 1, 1, ([1, 2, 3, 4], [9])),
        ([1, 2, 3, 4], [9], 3, 1, ([1, 2], [3, 4, 9])),
        ([1, 2, 3, 4], [9], 9, 3, ([1, 2, 3], [4, 9])),
        ([1], [9], 4, 0, ([1], [9])),
        ([1, 2, 1, 3, 3], [9], 4, 1, ([1, 2], [3, 9])),
        ([1, 2], [8, 9], 2, 1, ([1, 2], [8, 9])),
        ([1, 2], [2], 2, 1, ([1], [2])),
        ([1, 2, 3], [2], 2, 1, ([1, 2], [3, 2])),
    ],
)
def test_which_items_become_targets(
    history: list[int], targets: list[int], num_targets: int, min_history: int, expected: tuple[list[int], list[int]]
) -> None:
    user = with_more_targets(KnownUser("u", history, targets, 5, [7]), num_targets, min_history)
    assert (user.history, user.targets) == expected
    assert (user.time, user.shown) == (5, [7])
