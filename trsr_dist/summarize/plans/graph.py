"""What a plan is: a small graph of prompts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trsr_dist.prompts.text import SummaryPrompt


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
