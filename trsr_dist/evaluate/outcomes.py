"""Outcomes: all that a user's metrics depend on. Many users share one, so its metrics are computed once. Pure: numpy.

Metrics ask only where the positives stand among ties: with one positive, how many candidates score above it, how many
the same, and how many there are. Of a million users with 21 candidates there are a few hundred outcomes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from trsr_dist.evaluate.metrics import position_probabilities, tie_groups, tie_rate, user_metrics

Key = tuple[int, ...]
"""Number of candidates, then start, size and number of positives of each group of ties that holds a positive."""


class OutcomeTable:
    """The distinct outcomes met so far, numbered from 0.

    Args:
        top_k: cut-offs of the metrics.
    """

    def __init__(self, top_k: Sequence[int]) -> None:
        self._top_k = tuple(top_k)
        self._numbers: dict[Key, int] = {}
        self._rows: list[np.ndarray] = []
        self._tie_rates: list[float] = []

    @property
    def rows(self) -> np.ndarray:
        """Metrics of every outcome, float64, shape (num_outcomes, num_metrics)."""
        return np.array(self._rows)

    @property
    def tie_rates(self) -> np.ndarray:
        """Share of tied (positive, negative) pairs of every outcome, float64, shape (num_outcomes, 1)."""
        return np.array(self._tie_rates)[:, None]

    def add(self, scores: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> np.ndarray:
        """Outcomes of some users.

        Args:
            scores: per user, shape (num_candidates,), finite.
            labels: per user, of the same shape: 1 for a positive, 0 for a negative; both must occur.

        Returns:
            int32, shape (num_users,).
        """
        lengths = np.array([len(user) for user in labels])
        starts = np.cumsum(lengths) - lengths
        flat_scores, is_positive = np.concatenate(scores), np.concatenate(labels) == 1
        num_positives = np.add.reduceat(is_positive, starts, dtype=np.int64)
        numbers = np.empty(len(lengths), dtype=np.int32)
        single = num_positives == 1
        targets = np.zeros(len(lengths), dtype=flat_scores.dtype)
        targets[single] = flat_scores[is_positive & np.repeat(single, lengths)]
        target = np.repeat(targets, lengths)
        above = np.add.reduceat(flat_scores > target, starts, dtype=np.int64)
        tied = np.add.reduceat(flat_scores == target, starts, dtype=np.int64)
        keys, place = np.unique(np.stack([lengths, above, tied], axis=1)[single], axis=0, return_inverse=True)
        found = np.array([self._number((*key, 1)) for key in keys.tolist()], dtype=np.int32)
        numbers[single] = found[place.reshape(-1)]
        for user in np.flatnonzero(~single).tolist():
            numbers[user] = self._number(_key(scores[user], labels[user]))
        return numbers

    def counted(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The metrics of some users' outcomes, each outcome once, and how many users have it.

        Returns:
            float64, shape (num_different, num_metrics), and int64, shape (num_different,).
        """
        used, counts = np.unique(numbers, return_counts=True)
        return self.rows[used], counts

    def paired(self, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Differences ``one - other`` of the metrics of the same users under two systems; shapes as of ``counted``."""
        size = len(self._rows)
        used, counts = np.unique(one.astype(np.int64) * size + other, return_counts=True)
        rows = self.rows
        return rows[used // size] - rows[used % size], counts

    def recall_curve(self, numbers: np.ndarray, length: int) -> np.ndarray:
        """Mean over users of the share of positives within K places, for K from 1 to ``length``."""
        used, counts = np.unique(numbers, return_counts=True)
        keys = list(self._numbers)
        total = np.zeros(length)
        for number, count in zip(used.tolist(), counts.tolist(), strict=True):
            scores, labels = _example(keys[number])
            total += count * np.cumsum(position_probabilities(scores, labels)[0])[:length] / labels.sum()
        return total / len(numbers)

    def shortest(self, numbers: np.ndarray) -> int:
        """Candidates of the shortest list."""
        keys = list(self._numbers)
        return min(keys[number][0] for number in np.unique(numbers).tolist())

    def _number(self, key: Key) -> int:
        if key not in self._numbers:
            scores, labels = _example(key)
            self._numbers[key] = len(self._rows)
            self._rows.append(user_metrics(scores, labels, self._top_k))
            self._tie_rates.append(tie_rate(scores, labels))
        return self._numbers[key]


def _key(scores: np.ndarray, labels: np.ndarray) -> Key:
    starts, sizes, counts = tie_groups(scores, labels)
    held = np.flatnonzero(counts)
    groups = np.stack([starts[held], sizes[held], counts[held].astype(np.int64)], axis=1)
    return (len(labels), *chain.from_iterable(groups.tolist()))


def _example(key: Key) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of a list with this outcome, by falling score."""
    scores, labels = -np.arange(key[0], dtype=np.float64), np.zeros(key[0], dtype=np.int64)
    for start, size, count in zip(key[1::3], key[2::3], key[3::3], strict=True):
        scores[start : start + size] = -start
        labels[start : start + count] = 1
    return scores, labels
