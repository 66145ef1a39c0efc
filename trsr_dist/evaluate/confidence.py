"""Intervals and p-values over users, seeded. Pure: numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
CHUNK = 100


@dataclass(frozen=True, slots=True)
class Difference:
    """Paired difference of two runs in one metric."""

    mean: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(values: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Percentile interval of the mean, users resampled with replacement (Efron, 1979).

    Args:
        values: float64, shape (num_users, num_metrics).
        num_samples: resamples.
        seed: equal seeds give equal intervals.

    Returns:
        float64, shape (num_metrics, 2): lower and upper bound at 95%.
    """
    means = bootstrap_means(values, num_samples, seed)
    tail = (1 - LEVEL) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0).T


def bootstrap_means(values: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Means of the resamples, shape (num_samples, num_metrics); a chunk of weights is in memory at once."""
    num_users = len(values)
    stream = np.random.default_rng(seed)
    shares = np.full(num_users, 1 / num_users)
    means = []
    for first in range(0, num_samples, CHUNK):
        weights = stream.multinomial(num_users, shares, size=min(CHUNK, num_samples - first))
        means.append(weights @ values / num_users)
    return np.concatenate(means)


def sign_flip_p_values(differences: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Two-sided p-values of "the mean paired difference is 0": each user's sign is as likely to be the other.

    The observed signs count as one of the draws, so no p-value is 0 (Phipson and Smyth, 2010).

    Args:
        differences: float64, shape (num_users, num_metrics).
        num_samples: random sign vectors.
        seed: of the signs.

    Returns:
        float64, shape (num_metrics,).
    """
    stream = np.random.default_rng(seed)
    observed = np.abs(differences.sum(axis=0))
    reached = np.zeros(differences.shape[1])
    for first in range(0, num_samples, CHUNK):
        signs = stream.integers(0, 2, size=(min(CHUNK, num_samples - first), len(differences))) * 2.0 - 1.0
        # The slack keeps sums that are equal but for rounding on the side of the null.
        reached += (np.abs(signs @ differences) >= observed - 1e-9 * len(differences)).sum(axis=0)
    return (1 + reached) / (1 + num_samples)


def paired_differences(one: np.ndarray, other: np.ndarray, num_samples: int, seed: int) -> list[Difference]:
    """``one - other`` per metric, users paired by row, with 95% interval and p-value.

    Args:
        one: float64, shape (num_users, num_metrics).
        other: of the same users.
        num_samples: resamples and sign vectors; at least 1.
        seed: of both.
    """
    differences = one - other
    bounds = bootstrap_interval(differences, num_samples, seed)
    p_values = sign_flip_p_values(differences, num_samples, seed)
    means = differences.mean(axis=0)
    return [
        Difference(float(mean), float(low), float(high), float(p))
        for mean, (low, high), p in zip(means, bounds, p_values, strict=True)
    ]
