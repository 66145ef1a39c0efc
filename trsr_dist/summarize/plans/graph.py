"""What a plan is, a small graph of prompts, and the schemes that come with the package. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trsr_dist.prompts.text import SummaryPrompt, block_instruction, merge_instruction, update_instruction
from trsr_dist.words import count_words, cut_words

RAW_VERSION = 1
"""Raised whenever the texts of ``raw_text`` change; part of the shards' settings."""
SEPARATOR = " | "


@dataclass(frozen=True, slots=True)
class Node:
    """One summary to be made."""

    kind: str
    """Its name in the provenance: ``block``, ``merge``, ``update``."""
    instruction: Callable[[str], str]
    """From the domain to the words that ask for it."""
    parents: tuple[int, ...] = ()
    """Positions in the plan of the nodes whose texts it reads; always earlier ones."""
    start: int = 0
    """First item of the history that it reads itself."""
    stop: int = 0
    """One past the last."""


Plan = tuple[Node, ...]
"""Nodes in an order in which parents come first; the last one is the user's summary. Empty: no summary."""
Planner = Callable[[int, int, int], Plan]
"""From the number of items, the block size and the fan-in to a plan."""
Writer = Callable[[Sequence[str], int, int], str]
"""From the texts of a history (oldest first), the number of recent items and the most words to a text."""


def blocks(num_items: int, block_size: int) -> list[tuple[int, int]]:
    """Spans (start, stop) of consecutive items; the last may be shorter.

    They start at the oldest item, so a user who gains items keeps all full blocks, and with them the cached texts.
    """
    return [(start, min(start + block_size, num_items)) for start in range(0, num_items, block_size)]


def node_prompt(node: Node, items: Sequence[str], previous: Sequence[str], domain: str) -> SummaryPrompt:
    """The prompt of a node.

    Args:
        node: the node.
        items: texts of the whole history, oldest first.
        previous: texts of the node's parents.
        domain: wording of the instructions.
    """
    return SummaryPrompt(node.instruction(domain), tuple(previous), tuple(items[node.start : node.stop]))


def children(plan: Plan) -> list[list[int]]:
    """For each node, the positions of the nodes that read its text."""
    found: list[list[int]] = [[] for _ in plan]
    for position, node in enumerate(plan):
        for parent in node.parents:
            found[parent].append(position)
    return found


def heights(plan: Plan) -> list[int]:
    """For each node, how many nodes must still follow it one after another: what is high should go first."""
    height = [0] * len(plan)
    for position in range(len(plan) - 1, -1, -1):
        for parent in plan[position].parents:
            height[parent] = max(height[parent], height[position] + 1)
    return height


def hierarchical(num_items: int, block_size: int, fan_in: int) -> Plan:
    """Block summaries, merged level by level (LLM-TRSR, arXiv 2403.13325: as a CNN pools).

    Groups of at most ``fan_in`` summaries are merged until one is left; the paper's single merge of all of them would
    overflow the context of a long history.
    """
    nodes = [Node("block", block_instruction, (), *span) for span in blocks(num_items, block_size)]
    level = list(range(len(nodes)))
    while len(level) > 1:
        groups = [level[i : i + fan_in] for i in range(0, len(level), fan_in)]
        level = []
        for group in groups:
            if len(group) > 1:
                nodes.append(Node("merge", merge_instruction, tuple(group)))
            level.append(len(nodes) - 1 if len(group) > 1 else group[0])  # one alone goes up a level as it is
    return tuple(nodes)


def recurrent(num_items: int, block_size: int, fan_in: int) -> Plan:
    """A chain: summary t from summary t-1 and block t (LLM-TRSR: as an RNN). ``fan_in`` plays no part."""
    nodes = []
    for number, span in enumerate(blocks(num_items, block_size)):
        kind, instruction, parents = ("update", update_instruction, (number - 1,))
        if not number:
            kind, instruction, parents = ("block", block_instruction, ())
        nodes.append(Node(kind, instruction, parents, *span))
    return tuple(nodes)


def no_plan(num_items: int, block_size: int, fan_in: int) -> Plan:
    """No node at all: no engine is asked."""
    return ()


def no_text(items: Sequence[str], num_recent: int, max_words: int) -> str:
    """Nothing stands in place of the summary."""
    return ""


def raw_text(items: Sequence[str], num_recent: int, max_words: int) -> str:
    """The items before the recent ones, oldest first: what shows whether summaries of that length help.

    Of too many the latest are kept, the oldest of them cut at its tail.

    Args:
        items: texts of the whole history, oldest first.
        num_recent: this many of the latest stand in the prompt already.
        max_words: of the text, as ``count_words`` counts them; a separator is one of them.
    """
    shown: list[str] = []
    room = max_words
    for item in reversed(items[: max(0, len(items) - num_recent)]):
        room -= count_words(SEPARATOR) * bool(shown)
        if room < 1:
            break
        shown.append(cut_words(item, room))
        room -= count_words(shown[-1])
    return SEPARATOR.join(reversed(shown))


class Scheme(NamedTuple):
    """How a history becomes one summary."""

    plan: Planner
    text: Writer = no_text
    """Writes what stands in place of the summary where the plan makes none."""


BUILT_IN = {
    "hierarchical": Scheme(hierarchical),
    "recurrent": Scheme(recurrent),
    "none": Scheme(no_plan),
    "raw": Scheme(no_plan, raw_text),
}
"""By the value of summarize.scheme."""
