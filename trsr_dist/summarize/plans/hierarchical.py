"""Block summaries, merged level by level (LLM-TRSR, arXiv 2403.13325: as a CNN pools). Pure."""

from __future__ import annotations

from trsr_dist.prompts.text import block_instruction, merge_instruction
from trsr_dist.summarize.plans.graph import Node, Plan, blocks


def plan(num_items: int, block_size: int, fan_in: int) -> Plan:
    """Groups of at most ``fan_in`` summaries are merged until one is left; the paper's single merge of all of them
    would overflow the context of a long history."""
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
