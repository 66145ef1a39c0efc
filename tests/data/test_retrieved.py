"""Candidates of one's own retriever: valid and test users get its lists, train users drawn pools as before."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.raw import clicks, make_config, user_records, write_jsonl
from tests.data.test_prepare import manifest, run
from tests.data.test_tables import WRITERS
from trsr_dist.data import prepare as job
from trsr_dist.data import source
from trsr_dist.data.candidates import split_by_user
from trsr_dist.data.prepare import prepare
from trsr_dist.data.retrieved import RetrievedLists
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import ConfigError, DataError
from trsr_dist.evaluate.job import evaluate_baselines

USERS = 24
LISTS = "data.candidates_file=lists.jsonl"
Rows = list[dict[str, Any]]


def retrieved(user: int) -> list[str]:
    """One item of the history, three others, and for every second user the target."""
    own = clicks(user)
    others = [f"N{i}" for i in range(60) if f"N{i}" not in own][user : user + 3]
    return [own[2], *others, *(own[-1:] if user % 2 else [])]


def expected(user: int) -> list[tuple[str, int]]:
    """Sorted items with their labels."""
    own = clicks(user)
    return sorted((item, int(item == own[-1])) for item in {*retrieved(user), own[-1]} - {*own[:-1]})


def rows(column: str = "candidates") -> Rows:
    return [{"user": f"u{user}", column: retrieved(user)} for user in range(USERS)]


def pairs() -> Rows:
    return [{"user": row["user"], "item": item} for row in rows() for item in row["candidates"]]


def write(folder: Path, lists: Rows, name: str = "lists.jsonl") -> None:
    WRITERS[Path(name).suffix](write_jsonl(folder, user_records(USERS)) / name, lists)


def lists_of(store: HistoryStore, *splits: str) -> dict[int, list[tuple[str, int]]]:
    """By the user's number: item ids and labels, in order."""
    found = {}
    for row in (store.user(split, index) for split in splits for index in range(store.num_users(split))):
        items = [store.catalogue.id(item) for item in row.candidates]
        found[int(row.user[1:])] = list(zip(items, row.labels, strict=True))
    return found


FORMS = [
    ("lists.jsonl", rows(), ""),
    ("lists.parquet", rows("found"), "data.columns={candidates: found}"),
    ("pairs.csv", pairs(), ""),
]


@pytest.mark.parametrize(("name", "lists", "columns"), FORMS, ids=[name for name, _, _ in FORMS])
def test_lists_take_the_place_of_drawn_ones(tmp_path: Path, name: str, lists: Rows, columns: str) -> None:
    write(tmp_path, lists, name)
    store = run(tmp_path, "jsonl", f"data.candidates_file={name}", *filter(None, [columns]))
    held_out, counts = lists_of(store, "valid", "test"), manifest(tmp_path)["counts"]
    assert {user: sorted(found) for user, found in held_out.items()} == {user: expected(user) for user in held_out}
    places = {[label for _, label in found].index(1) for found in held_out.values()}
    assert len(places) > 1, "shuffled"
    missed = [user for user in held_out if user % 2 == 0]
    assert sum(counts.get(f"{split}_users_with_missed_target", 0) for split in ("valid", "test")) == len(missed) > 0
    assert counts["candidates_in_a_history"] == len(held_out) > len(missed)
    assert name in manifest(tmp_path)["inputs"]
    prepare(make_config(tmp_path, "jsonl", f"run.dir={tmp_path / 'drawn'}"))
    assert lists_of(HistoryStore(tmp_path / "drawn" / "histories"), "train") == lists_of(store, "train")


def test_no_task_keeps_the_lists_of_all_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of candidates for millions of users are more than a node's memory."""
    write(tmp_path, rows())
    whole = lists_of(run(tmp_path, "jsonl", LISTS), "valid", "test")
    kept = []
    negatives = RetrievedLists.negatives
    monkeypatch.setattr(
        RetrievedLists, "negatives", lambda self, *of: kept.append(len(self._lists)) or negatives(self, *of)
    )
    monkeypatch.setattr(job, "PART_BYTES", 200)
    monkeypatch.setattr(source, "UNIT_BLOCKS", 1)
    monkeypatch.setattr(source, "BLOCK_BYTES", 300)
    settings = make_config(tmp_path, "jsonl", LISTS, f"run.dir={tmp_path / 'parts'}")
    assert prepare(settings) == 0
    assert lists_of(HistoryStore(tmp_path / "parts" / "histories"), "valid", "test") == whole
    assert 0 < max(kept) < USERS / 2


@pytest.mark.parametrize("policy", ["add", "skip"])
def test_an_evaluation_says_what_was_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str) -> None:
    write(tmp_path, rows())
    store = run(tmp_path, "jsonl", LISTS, f"data.missed_targets={policy}")
    users = lists_of(store, "test")
    num_missed = manifest(tmp_path)["counts"]["test_users_with_missed_target"]
    settings = [f"data.missed_targets={policy}", "evaluate.bootstrap_samples=0"]
    evaluate_baselines(make_config(tmp_path, "jsonl", LISTS, *settings))
    if policy == "add":
        assert sum(user % 2 == 0 for user in users) == num_missed > 0
        words = f"retrieved; of {num_missed} of {len(users)} users the target was not retrieved and is added"
    else:
        assert all(user % 2 for user in users)
        total = len(users) + num_missed
        words = f"retrieved; {num_missed} of {total} users left out, whose target was not retrieved"
    assert f"{len(users)} test users, " in (said := capsys.readouterr().out) and f"negatives: {words}\n" in said
    with pytest.raises(ConfigError, match=r"data\.candidates_file=: the candidate lists were drawn with lists\.jsonl"):
        evaluate_baselines(make_config(tmp_path, "jsonl"))


HELD_OUT = next(user for user in range(1, USERS, 2) if split_by_user([f"u{user}"], (2, 1, 1)) == 2)
"""A user of the test split, whose target is retrieved."""
NONE = (
    rf"test user 'u{HELD_OUT}': data\.candidates_file names no candidate of this user beside targets and history; add"
)


def without(user: int) -> Rows:
    return [row for row in rows() if row["user"] != f"u{user}"]


def instead(user: int, items: list[str]) -> Rows:
    return [*without(user), {"user": f"u{user}", "candidates": items}]


BAD: dict[str, tuple[Rows, str]] = {
    "an unknown item": (
        instead(HELD_OUT, ["N1", "X9"]),
        rf"lists\.jsonl:24: candidate 'X9' of user 'u{HELD_OUT}' is not in the item file; add the item, or set ",
    ),
    "an item twice": (
        instead(HELD_OUT, ["N1", "N2", "N1"]),
        rf"lists\.jsonl: user 'u{HELD_OUT}' has candidate 'N1' twice; remove",
    ),
    "no candidate": (instead(HELD_OUT, []), NONE),
    "no row": (without(HELD_OUT), NONE),
    "other fields": (
        [{"user": "u3", "items": []}],
        r"lists\.jsonl:1: fields user, items; expected user and candidates",
    ),
    "no list": ([{"user": "u3", "candidates": "N1"}], r"lists\.jsonl:1: candidates is 'N1', expected a list of ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lists_are_named(tmp_path: Path, case: str) -> None:
    lists, message = BAD[case]
    write(tmp_path, lists)
    with pytest.raises(DataError, match=message):
        prepare(make_config(tmp_path, "jsonl", LISTS))


def test_what_may_be_left_out_is_counted(tmp_path: Path) -> None:
    write(tmp_path, [*instead(HELD_OUT, ["X9", "X8"]), {"user": "nobody", "candidates": ["N1"]}])
    store = run(tmp_path, "jsonl", LISTS, "data.unknown_items=skip", "data.too_few_negatives=skip")
    counts = manifest(tmp_path)["counts"]
    assert counts["candidates_not_in_catalogue"] == 2 and counts["users_with_too_few_negatives"] == 1
    assert HELD_OUT not in lists_of(store, "test") and lists_of(store, "test")


def test_replaced_bytes_are_counted(tmp_path: Path) -> None:
    write(tmp_path, rows())
    path = tmp_path / "raw_files" / "lists.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"user"', b'{"note": "\xff", "user"', 5))
    run(tmp_path, "jsonl", LISTS, "data.encoding_errors=replace")
    assert manifest(tmp_path)["counts"]["lines_with_replaced_bytes"] == 5


def test_users_who_are_left_out_are_not_among_those_whose_target_is_added(tmp_path: Path) -> None:
    write(tmp_path, [row for row in rows() if int(row["user"][1:]) % 3])
    store = run(tmp_path, "jsonl", LISTS, "data.too_few_negatives=skip")
    for split in ("valid", "test"):
        users = lists_of(store, split)
        assert manifest(tmp_path)["counts"][f"{split}_users_with_missed_target"] == sum(not user % 2 for user in users)
        assert users and all(user % 3 for user in users)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, rows())
    with pytest.raises(DataError, match=r"other\.jsonl: missing \(found there: .*lists\.jsonl"):
        prepare(make_config(tmp_path, "jsonl", "data.candidates_file=other.jsonl"))
