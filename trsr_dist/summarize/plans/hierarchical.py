"""Block summaries, merged level by level (LLM-TRSR, arXiv 2403.13325: as a CNN pools). Pure."""

from __future__ import annotations

from trsr_dist.prompts.wording import block_instruction, merge_instruction
from trsr_dist.summarize.plans.graph import Node, Plan, blocks


def plan(num_items: int, block_size: int, fan_in: int) -> Plan:
    """Groups of at most ``fan_in`` summaries are merged until one is left; the paper's single merge of all of them
    would overflow the context of a long history."""
    nodes = [Node("block", block_instruction, (), *span) for span in blocks(num_items, block_size)]
    level = list(range(len(nodes)))
    while len(level) > 1:
        groups = [level[i : i + fan_in] for i in range(0, len(level), fan_in)]
        level = [_merged(nodes, group) for group in groups]
    return tuple(nodes)


def _merged(nodes: list[Node], group: list[int]) -> int:
    """Position of the group's merge; a group of one goes up a level as it is."""
    if len(group) == 1:
        return group[0]
    nodes.append(Node("merge", merge_instruction, tuple(group)))
    return len(nodes) - 1
