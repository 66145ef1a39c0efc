"""Ranking metrics of one user, each the exact expectation over random orders of tied scores. Pure: numpy only.

A scorer that gives every candidate the same score therefore gets exactly what a random order gets on average, wherever
the positives stand in the list.

Metrics depend on the outcome alone: where the positives stand among ties; with one positive, how many candidates score
above it, how many the same, and how many there are. Of a million users with 21 candidates there are a few hundred
outcomes at most, so the metrics of each are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np

from trsr_dist.errors import DataError

Key = tuple[int, ...]
"""Number of candidates, then start, size and number of positives of each group of ties that holds a positive."""


def user_metrics(scores: np.ndarray, labels: np.ndarray, top_k: Sequence[int]) -> np.ndarray:
    """Metrics of one user, in the order of ``metric_names``.

    Recall@K: share of the positives among the first K. MRR@K: 1 / rank of the first positive, 0 beyond K. NDCG@K: gain
    1 / log2(rank + 1) of each positive among the first K, over that of the best order (Jarvelin and Kekalainen, 2002).
    AUC: share of (positive, negative) pairs in the right order, ties counting half.

    Args:
        scores: float, shape (num_candidates,), finite.
        labels: 1 for a positive, 0 for a negative, shape (num_candidates,); both must occur.
        top_k: cut-offs.

    Returns:
        float64, shape (3 * len(top_k) + 1,).
    """
    hits, first = position_probabilities(scores, labels)
    ranks = np.arange(1, len(hits) + 1)
    num_positives = int(labels.sum())
    gains = 1.0 / np.log2(ranks + 1)
    recall = [hits[:k].sum() / num_positives for k in top_k]
    mrr = [(first[:k] / ranks[:k]).sum() for k in top_k]
    ndcg = [(hits[:k] * gains[:k]).sum() / gains[: min(k, num_positives)].sum() for k in top_k]
    positives, negatives = scores[labels == 1][:, None], scores[labels == 0][None, :]
    auc = float((positives > negatives).mean() + 0.5 * (positives == negatives).mean())
    return np.array([*recall, *mrr, *ndcg, auc])


def position_probabilities(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each rank, the probability that a positive stands there, and that the first positive stands there.

    Within a group of g tied candidates with p positives every place holds a positive with probability p / g; the first
    of them is at place j with probability p / (g - j + 1) times that of none before.

    Returns:
        Two float64 arrays of shape (num_candidates,).
    """
    starts, sizes, counts = tie_groups(scores, labels)
    hits = np.repeat(counts / sizes, sizes)
    first = np.zeros_like(hits)
    group = int(np.flatnonzero(counts)[0])
    start, size, count = int(starts[group]), int(sizes[group]), counts[group]
    here = np.minimum(1.0, count / (size - np.arange(size)))
    first[start : start + size] = here * np.r_[1.0, np.cumprod(1.0 - here[:-1])]
    return hits, first


def tie_groups(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates of equal score, by falling score: first place (from 0), size and number of positives of each group.

    Returns:
        Two int64 arrays and a float64 one of shape (num_groups,).
    """
    order = np.argsort(-scores)
    ordered, positive = scores[order], labels[order].astype(np.float64)
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return starts, np.diff(np.r_[starts, len(ordered)]), np.add.reduceat(positive, starts)


def tie_rate(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of a user's (positive, negative) pairs with equal scores: only those ties move the metrics."""
    return float((scores[labels == 1][:, None] == scores[labels == 0][None, :]).mean())


def average(values: np.ndarray, counts: np.ndarray | None = None) -> list[float]:
    """Means over users, rounded once only, whatever the order.

    Args:
        values: rows, float64, shape (num_rows, num_metrics).
        counts: how many users have each row, int64, shape (num_rows,); None: one each.
    """
    counts = np.ones(len(values), dtype=np.int64) if counts is None else counts
    # A count is a sum of powers of two, by which a float is multiplied exactly.
    bits = range(int(counts.max()).bit_length())
    terms = np.concatenate([values[(counts >> bit) & 1 == 1] * 2.0**bit for bit in bits])
    return [math.fsum(column) / int(counts.sum()) for column in terms.T.tolist()]


def check_user(user: str, scores: np.ndarray, labels: np.ndarray, items: Sequence[str]) -> None:
    """Refuse what has no metric.

    Raises:
        DataError: a score is not finite, or positives or negatives are missing.
    """
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise DataError(
            f"user {user!r}, item {items[bad[0]]!r}: score {scores[bad[0]]} is not finite; the model diverged, or its "
            "precision overflows (try train.precision=float32)"
        )
    if not labels.any() or labels.all():
        kind = "negative" if labels.any() else "positive"
        raise DataError(f"user {user!r}: no {kind} among {len(labels)} candidates; prepare the data again")


class OutcomeTable:
    """The distinct outcomes met so far, numbered from 0.

    Args:
        top_k: cut-offs of the metrics.
    """

    def __init__(self, top_k: Sequence[int]) -> None:
        self._top_k = tuple(top_k)
        self._numbers: dict[Key, int] = {}
        self._rows: list[np.ndarray] = []
        self._table = np.empty((0, 0))
        self._tie_rates: list[float] = []

    @property
    def rows(self) -> np.ndarray:
        """Metrics of every outcome, float64, shape (num_outcomes, num_metrics); put together once for all slices."""
        if len(self._table) < len(self._rows):
            self._table = np.array(self._rows)
        return self._table

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
        return self.add_all([scores], labels)[0]

    def add_all(self, systems: Sequence[Sequence[np.ndarray]], labels: Sequence[np.ndarray]) -> np.ndarray:
        """Outcomes of some users under several systems, numbered as system after system: int32, shape (num_systems,
        num_users). Each system's scores, and the labels, are those of ``add``."""
        lengths = np.array([len(user) for user in labels])
        starts, flat_labels = np.cumsum(lengths) - lengths, np.concatenate(labels)
        flat = np.stack([np.concatenate(scores).astype(np.float64) for scores in systems])
        single = np.add.reduceat(flat_labels == 1, starts, dtype=np.int64) == 1
        targets = np.zeros((len(systems), len(lengths)))
        targets[:, single] = flat[:, (flat_labels == 1) & np.repeat(single, lengths)]
        target = np.repeat(targets, lengths, axis=1)
        above = np.add.reduceat(flat > target, starts, axis=1, dtype=np.int64)
        tied = np.add.reduceat(flat == target, starts, axis=1, dtype=np.int64)
        # One number for system, length, above and tied, which is several times faster to compare.
        shape = (len(systems), *(int(lengths.max()) + 1,) * 3)
        parts = np.broadcast_arrays(np.arange(len(systems))[:, None], lengths, above, tied)
        codes, place = np.unique(np.ravel_multi_index(parts, shape)[:, single], return_inverse=True)
        keys = list(zip(*(part.tolist() for part in np.unravel_index(codes, shape)), strict=True))
        found, others = np.empty(len(keys), np.int32), np.flatnonzero(~single).tolist()
        numbers, first = np.empty(targets.shape, np.int32), 0
        for number, scores in enumerate(systems):
            while first < len(keys) and keys[first][0] == number:
                found[first] = self._number((*keys[first][1:], 1))
                first += 1
            numbers[number, others] = [self._number(outcome_of(scores[user], labels[user])) for user in others]
        numbers[:, single] = found[place.reshape(len(systems), -1)]
        return numbers

    def counted(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The different metrics of some users' outcomes, and how many users have them.

        Returns:
            float64, shape (num_different, num_metrics), and int64, shape (num_different,). Rows are sorted, so that
            what is drawn from them does not depend on how the outcomes are numbered.
        """
        used, counts = np.unique(numbers, return_counts=True)
        return _sorted_rows(self.rows[used], counts)

    def paired(self, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Differences ``one - other`` of the metrics of the same users under two systems; shapes as of ``counted``."""
        size = len(self._rows)
        used, counts = np.unique(one.astype(np.int64) * size + other, return_counts=True)
        rows = self.rows
        return _sorted_rows(rows[used // size] - rows[used % size], counts)

    def recall_curve(self, numbers: np.ndarray, length: int) -> np.ndarray:
        """Mean over users of the share of positives within K places, for K from 1 to ``length``."""
        used, counts = np.unique(numbers, return_counts=True)
        keys = list(self._numbers)
        total = np.zeros(length)
        for number, count in zip(used.tolist(), counts.tolist(), strict=True):
            scores, labels = example_of(keys[number])
            total += count * np.cumsum(position_probabilities(scores, labels)[0])[:length] / labels.sum()
        return total / len(numbers)

    def shortest(self, numbers: np.ndarray) -> int:
        """Candidates of the shortest list."""
        keys = list(self._numbers)
        return min(keys[number][0] for number in np.unique(numbers).tolist())

    def _number(self, key: Key) -> int:
        if key not in self._numbers:
            scores, labels = example_of(key)
            self._numbers[key] = len(self._rows)
            self._rows.append(user_metrics(scores, labels, self._top_k))
            self._tie_rates.append(tie_rate(scores, labels))
        return self._numbers[key]


def _sorted_rows(rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal rows become one."""
    rows, places = np.unique(rows, axis=0, return_inverse=True)
    return rows, np.bincount(places.ravel(), weights=counts).astype(np.int64)


def outcome_of(scores: np.ndarray, labels: np.ndarray) -> Key:
    """All that a user's metrics depend on; shapes as of ``user_metrics``."""
    starts, sizes, counts = tie_groups(scores, labels)
    held = np.flatnonzero(counts)
    groups = np.stack([starts[held], sizes[held], counts[held].astype(np.int64)], axis=1)
    return (len(labels), *chain.from_iterable(groups.tolist()))


def example_of(key: Key) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of a list with this outcome, by falling score."""
    scores, labels = -np.arange(key[0], dtype=np.float64), np.zeros(key[0], dtype=np.int64)
    for start, size, count in zip(key[1::3], key[2::3], key[3::3], strict=True):
        scores[start : start + size] = -start
        labels[start : start + count] = 1
    return scores, labels
