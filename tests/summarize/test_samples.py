"""The leak guard, and what a sample tells of its origin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from trsr_dist.data.store import UserRow
from trsr_dist.errors import DataError
from trsr_dist.records import Candidate, Item, Sample
from trsr_dist.summarize.plans.graph import hierarchical
from trsr_dist.summarize.scheduler import Result
from trsr_dist.summarize.units import SplitWork
from trsr_dist.summarize.worker import (
    OpenUnit,
    Recipe,
    SampleFacts,
    Started,
    Worker,
    check_leaks,
    node_provenance,
)

HISTORY = [Item("a", "title: A quiet final"), Item("b", "title: Stocks rise"), Item("c", "title: Rain")]


def test_a_target_in_the_history_is_an_error_or_counted() -> None:
    with pytest.raises(DataError, match="user 'u': target 'b' is also in the history.*repeated_target=keep"):
        check_leaks("u", HISTORY, [HISTORY[1]], repeated_kept=False)
    assert check_leaks("u", HISTORY, [HISTORY[1]], repeated_kept=True).repeated_targets == 1


def test_the_same_text_under_another_id_is_a_near_duplicate() -> None:
    targets = [Item("x", "Title -- a QUIET final!"), Item("y", "title: another final")]
    facts = check_leaks("u", HISTORY, targets, repeated_kept=False)
    assert (facts.repeated_targets, facts.near_duplicates) == (0, 1)


def test_provenance_names_blocks_by_their_items_and_nodes_by_their_texts() -> None:
    plan = hierarchical(3, 2, 8)
    records = [{"key": f"k{i}", "prompt": f"p{i}", "text": f"t{i}", "flags": ["cut"] * (i == 1)} for i in range(3)]
    records[1] |= {"sampled": True, "words_cut": 4}
    told = node_provenance(plan, records, HISTORY)
    assert told["nodes"] == [["block", 0, 2, "k0", "p0"], ["block", 2, 3, "k1", "p1"], ["merge", 0, 0, "k2", "p2"]]
    assert (told["flags"], told["sampled"], told["words_cut"]) == (["cut"], 1, 4)
    longer = node_provenance(hierarchical(3, 2, 8), records, [*HISTORY[:2], Item("d", "title: Wind")])
    assert longer["blocks"][0] == told["blocks"][0] and longer["blocks"][1] != told["blocks"][1]


def test_a_sample_shows_the_latest_items_and_the_summary() -> None:
    candidates = (Candidate("x", "t", 1),)
    store = SimpleNamespace(candidates=lambda row: candidates if row.candidates == [3] else ())
    unit = OpenUnit(SplitWork(Path(), "train", 1, 1), 0, None, [])
    started = Started(unit, 0, UserRow("u", [0, 1, 2], [3], [1], 0), HISTORY, SampleFacts(0, 0))

    def sample(num_recent: int) -> Sample:
        recipe = Recipe(lambda size: (), " + ".join, "news", num_recent, False, "fail", 0, {"scheme": "s"})
        return Worker(store, [], None, recipe, "task", 0.0, lambda: None)._sample(started, Result(started, ()))

    texts = tuple(item.text for item in HISTORY)
    assert [sample(number).recent for number in (0, 2, 3, 9)] == [(), texts[1:], texts, texts]
    assert sample(2).summary == " + ".join(texts) and sample(2).candidates == candidates
    told = {"scheme": "s", "blocks": [], "nodes": [], "flags": [], "sampled": 0, "words_cut": 0}
    assert sample(2).provenance == {**told, "history": ["a", "b", "c"]}
