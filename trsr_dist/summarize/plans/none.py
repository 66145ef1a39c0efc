"""The baseline without a summary. Pure."""

from __future__ import annotations

from trsr_dist.summarize.plans.graph import Plan


def plan(num_items: int, block_size: int, fan_in: int) -> Plan:
    """No node at all."""
    return ()
