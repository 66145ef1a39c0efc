"""Ranking metrics of one user, each the exact expectation over random orders of tied scores. Pure: numpy only.

A scorer that gives every candidate the same score therefore gets exactly what a random order gets on average, wherever
the positives stand in the list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trsr_dist.errors import DataError


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
    return np.array([*recall, *mrr, *ndcg, _auc(scores, labels)])


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
        raise DataError(f"user {user!r}: no {kind} among {len(labels)} candidates; prepare the data anew")


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    positives, negatives = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return float((positives > negatives).mean() + 0.5 * (positives == negatives).mean())
