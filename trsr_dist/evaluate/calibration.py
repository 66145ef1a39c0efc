"""Calibration of the log-odds read as probabilities. Pure: numpy only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NUM_BINS = 10
RANKING_LOSSES = ("pairwise", "listwise")
"""They do not change where a number is added to all scores of a user: the log-odds stand nowhere in particular."""


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


def has_scale(loss: str | None) -> bool:
    """Whether the loss of the training made the scores log-odds of yes; an unknown one is taken for such."""
    return loss not in RANKING_LOSSES


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
