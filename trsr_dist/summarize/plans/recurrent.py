"""Summary t from summary t-1 and block t (LLM-TRSR, arXiv 2403.13325: as an RNN). Pure."""

from __future__ import annotations

from trsr_dist.prompts.text import block_instruction, update_instruction
from trsr_dist.summarize.plans.graph import Node, Plan, blocks


def plan(num_items: int, block_size: int, fan_in: int) -> Plan:
    """A chain. ``fan_in`` plays no part."""
    nodes = []
    for number, span in enumerate(blocks(num_items, block_size)):
        kind, instruction, parents = ("update", update_instruction, (number - 1,))
        if not number:
            kind, instruction, parents = ("block", block_instruction, ())
        nodes.append(Node(kind, instruction, parents, *span))
    return tuple(nodes)
