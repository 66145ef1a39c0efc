"""Metrics of kinds of users: by history length, summary scheme, trims, cold targets, category. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trsr_dist.evaluate.metrics import average

MIN_USERS = 31
"""Slices with fewer users are not shown: their figures say nothing."""
LENGTH_BOUNDS = (5, 10, 15, 20, 30, 50)


def length_slice(num_items: int) -> str:
    """Name of the history length's slice, such as ``11-15``."""
    low = 1
    for high in LENGTH_BOUNDS:
        if num_items <= high:
            return f"{low}-{high}"
        low = high + 1
    return f"over {LENGTH_BOUNDS[-1]}"


def slice_table(
    facts: Sequence[Mapping[str, str]], values: np.ndarray, control: np.ndarray | None, metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per fact and value that more than 30 users share.

    Args:
        facts: of each user, such as {"history length": "6-10", "trimmed": "no"}.
        values: the model's metrics, shape (num_users, num_metrics).
        control: the control's metrics, of the same shape; None where it was not scored.
        metrics: names of the columns.
    """
    pairs = sorted({(kind, value) for user in facts for kind, value in user.items()}, key=_order)
    rows = []
    for kind, value in pairs:
        chosen = np.array([user.get(kind) == value for user in facts])
        if chosen.sum() < MIN_USERS:
            continue
        row = {"slice": kind, "value": value, "num_users": int(chosen.sum())}
        row["metrics"] = dict(zip(metrics, average(values[chosen]), strict=True))
        if control is not None:
            gains = average(values[chosen] - control[chosen])
            row["personalization_gain"] = dict(zip(metrics, gains, strict=True))
        rows.append(row)
    return rows


def _order(pair: tuple[str, str]) -> tuple[str, int, str]:
    kind, value = pair
    lead = value.removeprefix("over ").split("-")[0]
    return kind, int(lead) + value.startswith("over") if lead.isdigit() else 0, value
