"""Which figures an evaluation has, from its numbers and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trsr_dist.evaluate.plots import (
    metric_by_length,
    recall_by_k,
    reliability_plot,
    score_histogram,
    training_curve,
)
from trsr_dist.evaluate.results import ModelScores, RankedSystems
from trsr_dist.evaluate.table import column_title

MAX_K = 20
PLOTTED = ("random", "model", "base", "control", "popularity")
CURVES = {
    "train/loss": "Training loss",
    "train/learning_rate": "Learning rate",
    "valid/ndcg@10": "Validation users during the training",
}
"""Scalars of the training that are drawn, with their captions."""


def build_figures(
    results: Mapping[str, Any],
    systems: RankedSystems,
    model: ModelScores,
    training: Sequence[Mapping[str, Any]],
    metric: str,
) -> dict[str, Figure]:
    """The figures by caption.

    Args:
        results: the evaluation's numbers.
        systems: how they rank.
        model: its scores.
        training: rows of metrics.jsonl.
        metric: shown by history length.
    """
    figures = {"Recall by K": recall_by_k(recall_curves(systems))}
    by_length = [row for row in results["slices"] if row["slice"] == "history length"]
    if by_length:
        figures[f"{column_title(metric)} by length of the history"] = metric_by_length(by_length, metric)
    figures["Calibration"] = reliability_plot(results["calibration"])
    figures["Distribution of scores"] = score_histogram(model.scores, model.labels)
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


def recall_curves(systems: RankedSystems) -> dict[str, np.ndarray]:
    """Mean Recall@K of some systems for K from 1 to 20 or the shortest candidate list."""
    length = min(MAX_K, systems.table.shortest(systems.outcomes["random"]))
    shown = [name for name in PLOTTED if name in systems.outcomes]
    return {name: systems.table.recall_curve(systems.outcomes[name], length) for name in shown}
