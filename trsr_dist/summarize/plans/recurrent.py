"""Summary t from summary t-1 and block t (LLM-TRSR, arXiv 2403.13325: as an RNN). Pure."""

from __future__ import annotations

from trsr_dist.prompts.wording import block_instruction, update_instruction
from trsr_dist.summarize.plans.graph import Node, Plan, blocks


def plan(num_items: int, block_size: int, fan_in: int) -> Plan:
    """A chain. ``fan_in`` plays no part."""
    return tuple(_node(number, span) for number, span in enumerate(blocks(num_items, block_size)))


def _node(number: int, span: tuple[int, int]) -> Node:
    if not number:
        return Node("block", block_instruction, (), *span)
    return Node("update", update_instruction, (number - 1,), *span)
