"""Further candidate lists: drawn as the preparation draws, equal for equal seeds, ranked beside the own list.

The control gives everyone another user's text and leaves candidates and labels alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.data.raw import make_config, write_amazon, write_jsonl
from tests.evaluate.world import numbers_of, parts_of, scores_of, write_config
from trsr_dist.data.candidates import HELD_OUT
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.job import evaluate
from trsr_dist.evaluate.users import (
    DrawnLists,
    StoredSplit,
    change_sample,
    derangement,
    item_weights,
    targets_of,
)
from trsr_dist.records import Candidate, Sample
from trsr_dist.run import RunFolder

SAMPLE = Sample("a", "do", "likes tea", ("t1", "t2"), (Candidate("x", "text", 1), Candidate("y", "other", 0)))
OTHER = Sample("b", "do", "likes jazz", ("j1",), (Candidate("z", "third", 1),))
PROTOCOLS = ("uniform", "popularity", "targets")


@pytest.fixture(scope="module")
def store(run: Path) -> HistoryStore:
    return HistoryStore(run / "histories")


def lists_of(store: HistoryStore, protocol: str, count: int = 6, seed: int = 0) -> DrawnLists:
    return DrawnLists(protocol, store, StoredSplit(store, "test"), count, seen_before_target=False, seed=seed)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_lists_hold_the_targets_and_nothing_of_the_history(store: HistoryStore, protocol: str) -> None:
    lists, weights = lists_of(store, protocol), item_weights(protocol, store, HELD_OUT)
    for index in range(store.num_users("test")):
        row = store.user("test", index)
        drawn = lists.stored(row.user).candidates
        targets = targets_of(row)
        assert len(drawn) == len(set(drawn)) == len(targets) * 7
        assert set(targets) <= set(drawn)
        assert not set(drawn) & set(row.history)
        assert weights[list(set(drawn) - set(targets))].all()
        assert [c.label for c in lists.candidates(row.user)] == [int(item in targets) for item in drawn]


def test_draws_depend_on_seed_protocol_and_user_alone(store: HistoryStore) -> None:
    users = [store.user("test", index).user for index in range(40)]

    def drawn(protocol: str, seed: int) -> list[list[int]]:
        lists = lists_of(store, protocol, seed=seed)
        return [lists.stored(user).candidates for user in users]

    assert drawn("uniform", 0) == drawn("uniform", 0)
    assert drawn("uniform", 0) != drawn("uniform", 1)
    assert drawn("uniform", 0) != drawn("popularity", 0)
    backwards = lists_of(store, "uniform")
    assert [backwards.stored(user).candidates for user in reversed(users)] == drawn("uniform", 0)[::-1]
    places = [row.index(targets_of(store.user("test", number))[0]) for number, row in enumerate(drawn("uniform", 0))]
    assert len(set(places)) == 7, "the target may stand anywhere"


def test_popular_items_are_drawn_as_often_as_they_are_clicked(store: HistoryStore) -> None:
    weights = item_weights("targets", store, HELD_OUT)
    counts = np.zeros(len(weights))
    for seed in range(20):
        lists = lists_of(store, "targets", 3, seed)
        for index in range(store.num_users("test")):
            row = store.user("test", index)
            np.add.at(counts, list(set(lists.stored(row.user).candidates) - set(targets_of(row))), 1)
    once, often = counts[weights == 1].mean(), counts[weights >= 3].mean()
    assert not counts[weights == 0].any()
    assert 2.0 < often / once < 4.5


def test_negatives_keep_to_the_targets_locale_where_there_are_several(tmp_path: Path) -> None:
    write_amazon(tmp_path, users=60)
    prepare(make_config(tmp_path, "amazon_m2"))
    store = HistoryStore(tmp_path / "run" / "histories")
    lists = lists_of(store, "uniform")
    for index in range(store.num_users("test")):
        row = store.user("test", index)
        found = {candidate.item[:3] for candidate in lists.candidates(row.user)}
        assert found == {store.catalogue.id(row.history[0])[:3]}


@pytest.mark.parametrize("protocol", ["popularity", "targets"])
@pytest.mark.parametrize(("split", "month"), [("valid", 2), ("test", 3)])
def test_negatives_are_as_old_as_the_targets_where_splits_are_by_time(
    tmp_path: Path, protocol: str, split: str, month: int
) -> None:
    """Each month has other items: a target's age tells nothing."""
    months = [(15 * (i // 30), i % 13) for i in range(120)]
    rows = [{"history": [f"N{first}"], "target": f"N{first + 1 + i}", "time": 1000 + first} for first, i in months]
    write_jsonl(tmp_path, [{"user": f"u{number}", **row} for number, row in enumerate(rows)])
    config = make_config(tmp_path, "jsonl", "data.split_by=time", f"evaluate.split={split}")
    prepare(config)
    store = HistoryStore(tmp_path / "run" / "histories")
    draws = Evaluation(config, RunFolder(tmp_path / "run"), "", tmp_path).draws()
    lists = DrawnLists(protocol, store, StoredSplit(store, split), **draws, seed=0)
    for user in store.names(split):
        assert {int(candidate.item[1:]) // 15 for candidate in lists.candidates(user)} == {month}


def test_too_few_items_are_an_error(store: HistoryStore) -> None:
    user = store.user("test", 0).user
    with pytest.raises(DataError, match=rf"user '{user}': \d+ items .* protocol uniform, 400 are needed"):
        lists_of(store, "uniform", 400).stored(user)


def test_every_protocol_has_its_own_control_and_hash(run: Path, alone: Path, tmp_path: Path) -> None:
    names = [name for name in PROTOCOLS if name != "targets"]
    config = write_config(run, "protocols.yaml", evaluate={"protocols": list(PROTOCOLS), "baselines": ["popularity"]})
    evaluate(config, "RUN/merged", output=str(tmp_path))
    results = numbers_of(tmp_path)
    assert results["candidates"] == "targets"
    assert list(results["protocols"]) == names, "the own list is not drawn again"
    hashes = {results["candidate_hash"], *(entry["candidate_hash"] for entry in results["protocols"].values())}
    assert len(hashes) == 3
    for name in names:
        entry = results["protocols"][name]
        assert set(entry["baselines"]) == {"random", "popularity", "control"}
        gain = entry["personalization_gain"]["recall@3"]
        control = entry["baselines"]["control"]["recall@3"]
        assert gain["mean"] == pytest.approx(entry["metrics"]["recall@3"] - control)
        assert gain["low"] <= gain["mean"] <= gain["high"]
        assert scores_of(tmp_path, f"{name}/model").keys() == scores_of(tmp_path, f"{name}/control").keys()
    assert parts_of(tmp_path) == parts_of(alone), "the own list is scored as without them"
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r"<tr><td>(targets \(this evaluation\)|uniform|popularity)</td>", page)
    assert rows == ["targets (this evaluation)", "uniform", "popularity"]


@pytest.mark.parametrize("num_users", [2, 3, 10, 501])
def test_everyone_gets_another_user_and_everyone_is_given_once(num_users: int) -> None:
    others = derangement(num_users, seed=3)
    assert sorted(others) == list(range(num_users))
    assert all(other != user for user, other in enumerate(others))
    assert others == derangement(num_users, seed=3)
    assert num_users < 10 or others != derangement(num_users, seed=4)


def test_one_user_has_no_other() -> None:
    with pytest.raises(DataError, match="at least 2 users"):
        derangement(1, seed=0)


def test_changes_touch_only_their_part() -> None:
    control = change_sample(SAMPLE, "control", OTHER)
    assert (control.summary, control.recent) == (OTHER.summary, OTHER.recent)
    assert (control.user, control.candidates, control.instruction) == ("a", SAMPLE.candidates, "do")
    bare = change_sample(SAMPLE, "no_summary")
    assert (bare.summary, bare.recent) == ("", SAMPLE.recent)
    short = change_sample(SAMPLE, "no_recent")
    assert (short.summary, short.recent) == (SAMPLE.summary, ())
    assert change_sample(SAMPLE, "none") is SAMPLE
