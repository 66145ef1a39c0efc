import random
import sys
from pathlib import Path

import pytest

from trsr_dist.config.sections import PROMPTLESS
from trsr_dist.errors import ConfigError
from trsr_dist.prompts.text import block_instruction, merge_instruction, update_instruction
from trsr_dist.summarize import plans
from trsr_dist.summarize.plans import planner, schemes, writer
from trsr_dist.summarize.plans.graph import (
    RAW_VERSION,
    Node,
    Plan,
    children,
    heights,
    hierarchical,
    node_prompt,
    raw_text,
    recurrent,
)
from trsr_dist.words import count_words


def sources(plan: Plan, position: int) -> list[int]:
    """Items that a node's text rests on, in the order in which they are read."""
    node = plan[position]
    found = [item for parent in node.parents for item in sources(plan, parent)]
    return found + list(range(node.start, node.stop))


@pytest.mark.parametrize("scheme", ["hierarchical", "recurrent"])
@pytest.mark.parametrize("num_items", [1, 4, 5, 6, 25, 26, 41, 200, 206, 1000])
def test_the_summary_reads_each_item_once_in_order(scheme: str, num_items: int) -> None:
    plan = planner(scheme)(num_items, 5, 3)
    assert sources(plan, len(plan) - 1) == list(range(num_items))
    assert all(parent < position for position, node in enumerate(plan) for parent in node.parents)


def test_the_tree_never_merges_more_than_fan_in_nor_one_alone() -> None:
    for num_items in range(1, 300):
        sizes = [len(node.parents) for node in hierarchical(num_items, 5, 4) if node.kind == "merge"]
        assert all(2 <= size <= 4 for size in sizes)


def test_depth_of_a_tree_grows_with_the_logarithm_that_of_a_chain_with_the_length() -> None:
    assert max(heights(hierarchical(5000, 5, 10))) == 3
    assert max(heights(recurrent(5000, 5, 10))) == 999


@pytest.mark.parametrize("scheme", ["hierarchical", "recurrent"])
def test_new_items_leave_full_blocks_as_they_are(scheme: str) -> None:
    old, new = planner(scheme)(25, 5, 8), planner(scheme)(33, 5, 8)
    assert old[:5] == new[:5]


def test_children_are_the_inverse_of_parents() -> None:
    plan = hierarchical(100, 5, 3)
    pairs = {(parent, child) for child, node in enumerate(plan) for parent in node.parents}
    assert {(parent, child) for parent, found in enumerate(children(plan)) for child in found} == pairs


def test_prompts_are_built_from_the_parents_texts() -> None:
    items = [f"item {i}" for i in range(12)]
    tree, chain = hierarchical(12, 5, 8), recurrent(12, 5, 8)
    assert [node.kind for node in tree] == ["block", "block", "block", "merge"]
    assert [node.kind for node in chain] == ["block", "update", "update"]
    assert Node("end", block_instruction) == Node("end", block_instruction, (), 0, 0)
    block = node_prompt(tree[2], items, [], "news")
    assert (block.instruction, block.previous, block.items) == (block_instruction("news"), (), ("item 10", "item 11"))
    merge = node_prompt(tree[3], items, ["a", "b", "c"], "news")
    assert (merge.instruction, merge.previous, merge.items) == (merge_instruction("news"), ("a", "b", "c"), ())
    update = node_prompt(chain[1], items, ["a"], "news")
    assert (update.instruction, update.previous, update.items) == (
        update_instruction("news"),
        ("a",),
        ("item 5", "item 6", "item 7", "item 8", "item 9"),
    )


def test_schemes_without_prompts_are_those_that_the_config_knows() -> None:
    assert {scheme for scheme in schemes() if not planner(scheme)(30, 5, 8)} == set(PROMPTLESS)
    written = {scheme: writer(scheme)(["one", "two", "three"], 1, 100) for scheme in schemes()}
    assert written == {"hierarchical": "", "recurrent": "", "none": "", "raw": "one | two"}


def test_a_file_goes_before_a_scheme_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a copy that somebody changes would be passed over without a word."""
    (tmp_path / "recurrent.py").write_text("def plan(num_items, block_size, fan_in):\n    return ()\n")
    monkeypatch.setattr(plans, "__path__", [*plans.__path__, str(tmp_path)])
    assert planner("recurrent")(30, 5, 8) == () and writer("recurrent")(["one"], 0, 9) == ""
    assert schemes() == ["hierarchical", "none", "raw", "recurrent"]
    monkeypatch.delitem(sys.modules, "trsr_dist.summarize.plans.recurrent")
    with pytest.raises(ConfigError, match="there are hierarchical, none, raw, recurrent"):
        planner("graph")


@pytest.mark.parametrize(
    ("num_recent", "max_words", "expected"),
    [
        (1, 100, "a one | b two | c three"),
        (0, 100, "a one | b two | c three | d four"),
        (1, 8, "a one | b two | c three"),
        (1, 7, "a | b two | c three"),
        (1, 6, "b two | c three"),
        (1, 5, "b two | c three"),
        (1, 2, "c three"),
        (1, 1, "c"),
        (4, 100, ""),
        (9, 100, ""),
    ],
)
def test_raw_shows_the_latest_of_the_older_items_in_their_order(num_recent: int, max_words: int, expected: str) -> None:
    assert raw_text(["a one", "b two", "c three", "d four"], num_recent, max_words) == expected
    assert RAW_VERSION == 1, "other texts have another version"


def test_raw_fills_the_budget_and_never_exceeds_it() -> None:
    draw = random.Random(0)
    words = ["tea", "https://example.org/a/very/long/address", "\u6771\u4eac\u90fd\u5185", "cup;", "e\u0301te\u0301"]
    for _ in range(300):
        items = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 12))]
        num_recent, budget = draw.randint(0, 3), draw.randint(1, 60)
        older = items[: max(0, len(items) - num_recent)]
        whole, found = " | ".join(older), raw_text(items, num_recent, budget)
        assert count_words(found) <= budget
        if count_words(whole) <= budget:
            assert found == whole
        else:
            assert count_words(found) >= budget - 1, "a separator has no place where no word follows it"
