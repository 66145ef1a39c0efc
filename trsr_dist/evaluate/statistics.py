"""Statistics over users and scores: intervals, p-values, calibration. Pure: numpy only.

Many users have equal values, so each different row comes once, with the number of its users. That changes nothing but
the cost: a resample draws how often each row comes, a random sign vector how many of a row's users turn their sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trsr_dist.evaluate.metrics import average

LEVEL = 0.95
CHUNK_NUMBERS = 10_000_000
"""Drawn numbers that are in memory at once."""
NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Difference:
    """Paired difference of two runs in one metric."""

    mean: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(values: np.ndarray, counts: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Percentile interval of the mean, users resampled with replacement (Efron, 1979).

    Args:
        values: different rows, float64, shape (num_rows, num_metrics).
        counts: users of each row, int64, shape (num_rows,).
        num_samples: resamples.
        seed: equal seeds give equal intervals, of rows in the same order (``OutcomeTable.counted``).

    Returns:
        float64, shape (num_metrics, 2): lower and upper bound at 95%.
    """
    num_users = int(counts.sum())
    stream = np.random.default_rng(seed)
    shares = counts / num_users
    means = [
        stream.multinomial(num_users, shares, size=size) @ values / num_users for size in _chunks(num_samples, counts)
    ]
    tail = (1 - LEVEL) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T


def sign_flip_p_values(differences: np.ndarray, counts: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Two-sided p-values of "the mean paired difference is 0": each user's sign is as likely to be the other.

    The observed signs count as one of the draws, so no p-value is 0 (Phipson and Smyth, 2010).

    Args:
        differences: different rows, float64, shape (num_rows, num_metrics).
        counts: users of each row, int64, shape (num_rows,).
        num_samples: random sign vectors.
        seed: of the signs.

    Returns:
        float64, shape (num_metrics,).
    """
    stream = np.random.default_rng(seed)
    observed = np.abs(counts @ differences)
    reached = np.zeros(differences.shape[1])
    for size in _chunks(num_samples, counts):
        signs = 2.0 * stream.binomial(counts, 0.5, size=(size, len(counts))) - counts
        # The slack keeps sums that are equal but for rounding on the side of the null.
        reached += (np.abs(signs @ differences) >= observed - 1e-9 * counts.sum()).sum(axis=0)
    return (1 + reached) / (1 + num_samples)


def paired_differences(differences: np.ndarray, counts: np.ndarray, num_samples: int, seed: int) -> list[Difference]:
    """Mean per metric, with 95% interval and p-value.

    Args:
        differences: different rows, float64, shape (num_rows, num_metrics).
        counts: users of each row, int64, shape (num_rows,).
        num_samples: resamples and sign vectors; at least 1.
        seed: of both.
    """
    bounds = bootstrap_interval(differences, counts, num_samples, seed)
    p_values = sign_flip_p_values(differences, counts, num_samples, seed)
    return [
        Difference(mean, float(low), float(high), float(p))
        for mean, (low, high), p in zip(average(differences, counts), bounds, p_values, strict=True)
    ]


def _chunks(num_samples: int, counts: np.ndarray) -> Iterator[int]:
    """How many samples to draw at a time; the draws do not depend on it."""
    size = max(1, CHUNK_NUMBERS // len(counts))
    for first in range(0, num_samples, size):
        yield min(size, num_samples - first)


@dataclass(frozen=True, slots=True)
class Bin:
    """One row of the reliability table."""

    low: float
    high: float
    count: int
    predicted: float
    """Mean predicted probability of the candidates in the bin."""
    observed: float
    """Share of them that are positives."""


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Sigmoid of the log-odds, float64; written so that it cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * scores.astype(np.float64)))


def correct_prior(scores: np.ndarray, train_negatives: float, evaluation_negatives: float) -> np.ndarray:
    """Log-odds moved from the share of positives in training to that of the evaluation.

    A model trained with n negatives per positive has learned log-odds that hold log(1 / n) as prior; among m negatives
    per positive the prior is log(1 / m), so log(n / m) is added (King and Zeng, 2001).
    """
    return scores.astype(np.float64) + np.log(train_negatives / evaluation_negatives)


def reliability(scores: np.ndarray, labels: np.ndarray) -> list[Bin]:
    """Candidates in bins of equal width by predicted probability; empty bins are left out."""
    predicted = probabilities(scores)
    places = np.minimum((predicted * NUM_BINS).astype(int), NUM_BINS - 1)
    return [
        Bin(
            place / NUM_BINS,
            (place + 1) / NUM_BINS,
            int((places == place).sum()),
            float(predicted[places == place].mean()),
            float(labels[places == place].mean()),
        )
        for place in np.unique(places).tolist()
    ]


def expected_calibration_error(bins: list[Bin]) -> float:
    """Mean over candidates of |predicted - observed| of their bin (Naeini et al., 2015)."""
    total = sum(entry.count for entry in bins)
    return sum(entry.count * abs(entry.predicted - entry.observed) for entry in bins) / total


def calibration(scores: np.ndarray, labels: np.ndarray, train_negatives: float | None) -> dict[str, Any]:
    """ECE and reliability table of the raw log-odds and, where the training ratio is known, of the corrected ones.

    Args:
        scores: log-odds of all candidates, shape (num_candidates,).
        labels: 1 or 0, of the same shape.
        train_negatives: negatives per positive in training; None where unknown.
    """
    result = {"raw": _entry(scores, labels)}
    if train_negatives:
        ratio = float((labels == 0).sum() / (labels == 1).sum())
        result["corrected"] = _entry(correct_prior(scores, train_negatives, ratio), labels)
    return result


def _entry(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    bins = reliability(scores, labels)
    return {"ece": expected_calibration_error(bins), "bins": [asdict(entry) for entry in bins]}
