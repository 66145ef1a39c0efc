"""The leak guard, and what a sample tells of its origin."""

from __future__ import annotations

import pytest

from trsr_dist.errors import DataError
from trsr_dist.records import Candidate, Item
from trsr_dist.summarize.plans.graph import hierarchical
from trsr_dist.summarize.worker import check_leaks, make_sample, node_provenance

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
    sample = make_sample("u", "say", HISTORY, [Candidate("x", "t", 1)], 2, "last", {"scheme": "s"})
    assert sample.summary == "last" and sample.recent == ("title: Stocks rise", "title: Rain")
    assert sample.provenance == {"scheme": "s", "history": ["a", "b", "c"]}
    assert make_sample("u", "say", HISTORY, [], 0, "", {}).recent == ()
