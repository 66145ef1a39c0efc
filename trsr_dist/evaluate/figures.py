"""Which figures an evaluation has, from its numbers and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trsr_dist.evaluate.metrics import position_probabilities
from trsr_dist.evaluate.plots import (
    metric_by_length,
    recall_by_k,
    reliability_plot,
    score_histogram,
    training_curve,
)
from trsr_dist.evaluate.results import ScoredSystems
from trsr_dist.evaluate.table import column_title

MAX_K = 20
PLOTTED = ("model", "base", "control", "popularity")
CURVES = {
    "train/loss": "Training loss",
    "train/learning_rate": "Learning rate",
    "valid/ndcg@10": "Validation users during the training",
}
"""Scalars of the training that are drawn, with their captions."""


def build_figures(
    results: Mapping[str, Any], systems: ScoredSystems, training: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, Figure]:
    """The figures by caption.

    Args:
        results: the evaluation's numbers.
        systems: the scores.
        training: rows of metrics.jsonl.
        metric: shown by history length.
    """
    scores, labels = np.concatenate(systems.scores["model"]), np.concatenate(systems.labels)
    figures = {"Recall by K": recall_by_k(recall_curves(systems))}
    by_length = [row for row in results["slices"] if row["slice"] == "history length"]
    if by_length:
        figures[f"{column_title(metric)} by length of the history"] = metric_by_length(by_length, metric)
    figures["Calibration"] = reliability_plot(results["calibration"])
    figures["Distribution of scores"] = score_histogram(scores, labels)
    for name, caption in CURVES.items():
        curve = training_values(training, name)
        if curve:
            figures[caption] = training_curve(curve, name.partition("/")[2].replace("_", " "))
    return figures


def training_values(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """A scalar of the training by step, without what a resumed or a new training has made void: its steps and later
    ones of earlier starts."""
    values: dict[int, float] = {}
    for row in rows:
        if row.get("stage") == "train":
            while values and next(reversed(values)) > row["step"]:
                values.popitem()
            if name in row:
                values[row["step"]] = row[name]
    return values


def recall_curves(systems: ScoredSystems) -> dict[str, np.ndarray]:
    """Mean Recall@K of some systems for K from 1 to 20 or the shortest candidate list."""
    length = min(MAX_K, min(map(len, systems.labels)))
    curves = {"random": _recall([np.zeros(len(labels)) for labels in systems.labels], systems.labels, length)}
    for name in PLOTTED:
        if name in systems.scores:
            curves[name] = _recall(systems.scores[name], systems.labels, length)
    return curves


def _recall(scores: Sequence[np.ndarray], labels: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Mean over users of the share of positives within K places, shape (length,)."""
    total = np.zeros(length)
    for user_scores, user_labels in zip(scores, labels, strict=True):
        hits, _ = position_probabilities(user_scores, user_labels)
        total += np.cumsum(hits)[:length] / user_labels.sum()
    return total / len(labels)
