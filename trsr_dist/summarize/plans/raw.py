"""The older items themselves, at the length that a summary may have: what shows whether summaries help. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from trsr_dist.summarize.plans.graph import Plan
from trsr_dist.words import count_words, cut_words

VERSION = 1
"""Raised whenever the texts change; part of the shards' settings."""
SEPARATOR = " | "


def plan(num_items: int, block_size: int, fan_in: int) -> Plan:
    """No node at all: no engine is asked."""
    return ()


def text(items: Sequence[str], num_recent: int, max_words: int) -> str:
    """The items before the recent ones, oldest first; of too many the latest, the oldest of them cut at its tail.

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
