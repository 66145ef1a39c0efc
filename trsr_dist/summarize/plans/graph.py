"""How a history becomes one summary: small graphs of prompts. Pure.

Both schemes are those of LLM-TRSR (arXiv 2403.13325). Blocks start at the oldest item, so a user who gains items keeps
all full blocks, and with them the cached texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.prompts.wording import block_instruction, merge_instruction, update_instruction


@dataclass(frozen=True, slots=True)
class Node:
    """One summary to be made."""

    kind: str
    """``block``, ``merge`` or ``update``: which instruction it gets."""
    parents: tuple[int, ...] = ()
    """Positions in the plan of the nodes whose texts it reads; always earlier ones."""
    start: int = 0
    """First item of the history that it reads itself."""
    stop: int = 0
    """One past the last."""


Plan = tuple[Node, ...]
"""Nodes in an order in which parents come first; the last one is the user's summary. Empty: no summary."""

INSTRUCTIONS = {"block": block_instruction, "merge": merge_instruction, "update": update_instruction}


def hierarchical(num_items: int, block_size: int, fan_in: int) -> Plan:
    """Block summaries, merged in groups of at most ``fan_in``, level by level, until one is left."""
    nodes = [Node("block", (), start, stop) for start, stop in blocks(num_items, block_size)]
    level = list(range(len(nodes)))
    while len(level) > 1:
        groups = [level[i : i + fan_in] for i in range(0, len(level), fan_in)]
        level = [_merged(nodes, group) for group in groups]
    return tuple(nodes)


def _merged(nodes: list[Node], group: list[int]) -> int:
    """Position of the group's merge; a group of one goes up a level as it is."""
    if len(group) == 1:
        return group[0]
    nodes.append(Node("merge", tuple(group)))
    return len(nodes) - 1


def recurrent(num_items: int, block_size: int, fan_in: int) -> Plan:
    """Summary t from summary t-1 and block t. ``fan_in`` plays no part."""
    spans = blocks(num_items, block_size)
    return tuple(Node("update" if i else "block", (i - 1,) if i else (), *span) for i, span in enumerate(spans))


def no_summary(num_items: int, block_size: int, fan_in: int) -> Plan:
    """The baseline without a summary."""
    return ()


def blocks(num_items: int, block_size: int) -> list[tuple[int, int]]:
    """Spans (start, stop) of consecutive items; the last may be shorter."""
    return [(start, min(start + block_size, num_items)) for start in range(0, num_items, block_size)]


PLANS: dict[str, Callable[[int, int, int], Plan]] = {
    "hierarchical": hierarchical,
    "recurrent": recurrent,
    "none": no_summary,
}


def node_prompt(node: Node, items: Sequence[str], previous: Sequence[str], domain: str) -> SummaryPrompt:
    """The prompt of a node.

    Args:
        node: the node.
        items: texts of the whole history, oldest first.
        previous: texts of the node's parents.
        domain: wording of the instructions.
    """
    return SummaryPrompt(INSTRUCTIONS[node.kind](domain), tuple(previous), tuple(items[node.start : node.stop]))


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
