"""Metrics of kinds of users: by history length, summary scheme, trims, cold targets, category. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trsr_dist.evaluate.confidence import bootstrap_interval
from trsr_dist.evaluate.metrics import average
from trsr_dist.evaluate.outcomes import OutcomeTable

MIN_USERS = 31
"""Slices with fewer users are not shown: their figures say nothing."""
LENGTH_BOUNDS = (5, 10, 15, 20, 30, 50)
ABSENT = -1


def length_slice(num_items: int) -> str:
    """Name of the history length's slice, such as ``11-15``."""
    low = 1
    for high in LENGTH_BOUNDS:
        if num_items <= high:
            return f"{low}-{high}"
        low = high + 1
    return f"over {LENGTH_BOUNDS[-1]}"


class UserFacts:
    """What the slices tell users apart by, such as {"history length": "6-10", "trimmed": "no"}: a number a user."""

    def __init__(self) -> None:
        self._num_users = 0
        self._values: dict[str, dict[str, int]] = {}
        self._codes: dict[str, list[int]] = {}

    def add(self, facts: Mapping[str, str]) -> None:
        """The next user's; a kind that is left out puts the user in none of its slices."""
        for kind, value in facts.items():
            values = self._values.setdefault(kind, {})
            codes = self._codes.setdefault(kind, [])
            codes += [ABSENT] * (self._num_users - len(codes))
            codes.append(values.setdefault(value, len(values)))
        self._num_users += 1

    def slices(self) -> list[tuple[str, str, np.ndarray]]:
        """Kind, value and users (int64, positions) of each slice that is large enough, in the order of the tables."""
        found = []
        for kind, values in self._values.items():
            codes = np.array(self._codes[kind])
            order = np.argsort(codes, kind="stable")
            starts = np.searchsorted(codes[order], np.arange(len(values) + 1))
            for value, code in values.items():
                if starts[code + 1] - starts[code] >= MIN_USERS:
                    found.append((kind, value, order[starts[code] : starts[code + 1]]))
        return sorted(found, key=lambda entry: _order(*entry[:2]))


def slice_table(
    facts: UserFacts,
    table: OutcomeTable,
    model: np.ndarray,
    control: np.ndarray | None,
    metrics: list[str],
    num_samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One row per fact and value that more than 30 users share.

    Args:
        facts: of all users.
        table: of the outcomes.
        model: outcomes of the users under the model, int32, shape (num_users,).
        control: under the control; None where it was not scored.
        metrics: names of the columns.
        num_samples: bootstrap resamples; 0: no intervals.
        seed: of the resamples.
    """
    rows = []
    for kind, value, users in facts.slices():
        row = {"slice": kind, "value": value, "num_users": len(users)}
        found = table.counted(model[users])
        row["metrics"] = _named(metrics, average(*found))
        if num_samples:
            row["confidence"] = _named(metrics, bootstrap_interval(*found, num_samples, seed).tolist())
        if control is not None:
            gains = table.paired(model[users], control[users])
            row["personalization_gain"] = _named(metrics, average(*gains))
            if num_samples:
                row["gain_confidence"] = _named(metrics, bootstrap_interval(*gains, num_samples, seed).tolist())
        rows.append(row)
    return rows


def _named(metrics: list[str], values: list[Any]) -> dict[str, Any]:
    return dict(zip(metrics, values, strict=True))


def _order(kind: str, value: str) -> tuple[str, int, str]:
    lead = value.removeprefix("over ").split("-")[0]
    return kind, int(lead) + value.startswith("over") if lead.isdigit() else 0, value
