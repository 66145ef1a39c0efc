"""Every setting of the data section does what it says."""

from collections import Counter
from pathlib import Path

import pytest

from tests.data.raw import NUM_ITEMS, clicks, make_config, user_records, write_jsonl, write_mind
from tests.data.test_prepare import ids, manifest, run, users_of
from trsr_dist.data.prepare import prepare
from trsr_dist.errors import ConfigError, DataError


def test_length_filters_skip_or_cut(tmp_path: Path) -> None:
    records = [
        {"user": f"u{i}", "history": [f"N{j}" for j in range(i)], "target": f"N{i}", "time": 9} for i in range(30)
    ]
    write_jsonl(tmp_path, records)
    store = run(tmp_path, "jsonl", "data.min_history=3", "data.max_history=20")
    assert {int(user[1:]) for user in users_of(store)} == set(range(3, 21))
    counts = manifest(tmp_path)["counts"]
    assert counts["users_with_empty_history"] == 1
    assert counts["users_below_min_history"] == 2
    assert counts["users_above_max_history"] == 9
    prepare(make_config(tmp_path, "jsonl", "data.max_history=4", "data.long_histories=cut"), force=True)
    store = run(tmp_path, "jsonl", "data.max_history=4", "data.long_histories=cut")
    row = users_of(store)["u25"][1]
    assert ids(store, row.history) == ["N21", "N22", "N23", "N24"]
    negatives = [item for item, label in zip(ids(store, row.candidates), row.labels, strict=True) if not label]
    assert all(int(item[1:]) > 25 for item in negatives), "the items cut away are no negatives either"


@pytest.mark.parametrize(("policy", "kept"), [("drop", 23), ("keep", 24)])
def test_repeated_targets(tmp_path: Path, policy: str, kept: int) -> None:
    records = user_records()
    records[5]["target"] = records[5]["history"][2]
    write_jsonl(tmp_path, records)
    store = run(tmp_path, "jsonl", f"data.repeated_target={policy}")
    assert len(users_of(store)) == kept
    assert sum(n for name, n in manifest(tmp_path)["counts"].items() if name.startswith("users_with_repeated")) == 1


def test_unknown_items_are_left_out_and_counted(tmp_path: Path) -> None:
    records = user_records()
    records[5]["history"][1] = "nowhere"
    records[6]["target"] = "nowhere"
    write_jsonl(tmp_path, records)
    store = run(tmp_path, "jsonl", "data.unknown_items=skip")
    users = users_of(store)
    assert "u6" not in users
    assert ids(store, users["u5"][1].history) == [item for item in records[5]["history"] if item != "nowhere"]
    counts = manifest(tmp_path)["counts"]
    assert (counts["clicks_on_unknown_items"], counts["users_without_target"]) == (2, 1)


def test_items_without_text_go_with_their_clicks(tmp_path: Path) -> None:
    items = [{"id": f"N{i}", "title": f"T{i}" if i != 7 else " \n"} for i in range(NUM_ITEMS)]
    write_jsonl(tmp_path, user_records(), items)
    store = run(tmp_path, "jsonl", "data.empty_items=skip")
    assert len(store.catalogue) == NUM_ITEMS - 1
    found = {store.catalogue.id(item) for _, row in users_of(store).values() for item in row.history + row.candidates}
    assert "N7" not in found
    counts = manifest(tmp_path)["counts"]
    assert counts["items_without_text"] == 1
    lost = sum(clicks(i).count("N7") + user_records()[i]["shown"].count("N7") for i in range(24))
    assert counts["clicks_on_items_without_text"] == lost > 0


def test_users_without_enough_negatives_are_skipped_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path, user_records())
    store = run(tmp_path, "jsonl", "data.candidates=impressions", "data.too_few_negatives=skip")
    assert store.num_users("valid") == store.num_users("test") == 0
    assert store.num_users("train") > 0
    row = store.user("train", 0)
    shown = set(ids(store, row.candidates[1:]))
    assert shown <= {"N50", "N51"}
    counts = manifest(tmp_path)["counts"]
    assert counts["users_with_too_few_negatives"] + store.num_users("train") == 24
    assert counts["users_with_small_pool"] >= store.num_users("train")


def test_replaced_bytes_are_counted(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    path = raw / "news.tsv"
    path.write_bytes(path.read_bytes().replace(b"number 3\t", b"n\xfcmber 3\t"))
    store = run(tmp_path, "mind", "data.encoding_errors=replace")
    assert store.catalogue.text(3).endswith("title: Title n�mber 3")
    assert manifest(tmp_path)["counts"]["lines_with_replaced_bytes"] == 1


def test_targets_come_from_users_of_the_same_side(tmp_path: Path) -> None:
    write_jsonl(tmp_path, user_records(60))
    store = run(tmp_path, "jsonl", "data.candidates=targets")
    users = users_of(store)
    targets = {"train": set(), "held out": set()}
    for split, row in users.values():
        targets["train" if split == "train" else "held out"].add(row.candidates[row.labels.index(1)])
    for split, row in users.values():
        assert set(row.candidates) <= targets["train" if split == "train" else "held out"]


@pytest.mark.parametrize("strategy", ["targets", "popularity"])
def test_splits_of_different_times_draw_from_their_own(tmp_path: Path, strategy: str) -> None:
    """Each month has other items; valid's positives are no older than its negatives, test's no newer."""
    write_jsonl(
        tmp_path,
        [
            {"user": f"u{i}", "history": [f"N{15 * (i // 30) + i % 2}"], "target": f"N{15 * (i // 30) + 2 + i % 13}"}
            | {"time": 1000 + i}
            for i in range(120)
        ],
    )
    store = run(tmp_path, "jsonl", "data.split_by=time", f"data.candidates={strategy}")
    months = {"train": {0, 1}, "valid": {2}, "test": {3}}
    for split, row in users_of(store).values():
        assert {int(item[1:]) // 15 for item in ids(store, row.candidates)} <= months[split]


def test_category_negatives_share_the_targets_category(tmp_path: Path) -> None:
    write_jsonl(tmp_path, user_records())
    store = run(tmp_path, "jsonl", "data.candidates=category")
    for _, row in users_of(store).values():
        assert len({store.catalogue.category(item) for item in row.candidates}) == 1


def test_popular_items_are_drawn_more_often(tmp_path: Path) -> None:
    records = [
        {"user": f"u{i}", "history": [f"N{i % 40}", f"N{i % 5 + 40}"], "target": f"N{(i + 1) % 40}"} for i in range(400)
    ]
    write_jsonl(tmp_path, records)
    store = run(tmp_path, "jsonl", "data.candidates=popularity")
    drawn = Counter(item for _, row in users_of(store).values() for item in row.candidates)
    popular = sum(drawn[item] for item in range(40, 45)) / 5
    rare = sum(drawn[item] for item in range(40)) / 40
    assert popular > 2 * rare
    assert not any(drawn[item] for item in range(45, NUM_ITEMS)), "nobody clicked these"


def test_negatives_were_seen_before_the_target(tmp_path: Path) -> None:
    """User i meets N(i) .. N(i+2) at time i, so later items exist for nobody yet."""
    records = [
        {"user": f"u{i}", "history": [f"N{i}", f"N{i + 1}"], "target": f"N{i + 2}", "time": 100 + i} for i in range(50)
    ]
    write_jsonl(tmp_path, records)
    store = run(tmp_path, "jsonl", "data.seen_before_target=true", "data.too_few_negatives=skip")
    rows = [row for _, row in users_of(store).values()]
    assert len(rows) > 30
    for row in rows:
        negatives = [item for item, label in zip(row.candidates, row.labels, strict=True) if not label]
        assert all(store.catalogue.value(4, item) < row.time for item in negatives)
        assert max(row.candidates) <= row.time - 100 + 2
    assert store.catalogue.value(4, 30) == 100 + 28


def test_split_by_time(tmp_path: Path) -> None:
    write_jsonl(tmp_path, user_records(40))
    store = run(tmp_path, "jsonl", "data.split_by=time")
    times = {split: [store.user(split, i).time for i in range(store.num_users(split))] for split in ("train", "test")}
    times["valid"] = [store.user("valid", i).time for i in range(store.num_users("valid"))]
    assert [len(times[split]) for split in ("train", "valid", "test")] == [20, 10, 10]
    assert max(times["train"]) < min(times["valid"]) <= max(times["valid"]) < min(times["test"])


def test_max_users_keeps_the_first_in_hash_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path, user_records(40))
    everyone = users_of(run(tmp_path, "jsonl"))
    prepare(make_config(tmp_path, "jsonl", "data.max_users=25"), force=True)
    some = users_of(run(tmp_path, "jsonl", "data.max_users=25"))
    assert len(some) == 25
    assert all(some[user][0] == everyone[user][0] for user in some)
    assert manifest(tmp_path)["counts"]["users_above_max_users"] == 15


@pytest.mark.parametrize("setting", ["data.split_by=time", "data.seen_before_target=true"])
def test_settings_that_need_times(tmp_path: Path, setting: str) -> None:
    write_jsonl(tmp_path, [{k: v for k, v in record.items() if k != "time"} for record in user_records()])
    with pytest.raises(DataError, match="have none"):
        run(tmp_path, "jsonl", setting)


@pytest.mark.parametrize(
    ("data_format", "overrides", "message"),
    [
        ("mind", ["data.candidates=impressions"], "needs data.target=impression"),
        ("amazon_m2", ["data.candidates=impressions"], "no impressions"),
        ("jsonl", ["data.target=impression"], "has none"),
        ("mind", ["data.item_fields=[titel]"], "'titel' is not a field"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, data_format: str, overrides: list[str], message: str) -> None:
    write_mind(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, data_format, *overrides)
    assert not (tmp_path / "run" / "histories").exists()
