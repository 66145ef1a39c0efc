"""Figures of an evaluation, for the report (SVG) and TensorBoard: which there are, and how each is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trsr_dist.evaluate.results import ModelScores, RankedSystems
from trsr_dist.evaluate.table import SYSTEMS, column_title

MAX_K = 20
MAX_POINTS = 400
"""Of a curve: more are a band, not a line."""
TAIL = 0.001
"""Share of the scores on either side that has no bins to itself."""
PLOTTED = ("random", "model", "base", "control", "popularity")
CURVES = {
    "train/loss": "Training loss",
    "train/learning_rate": "Learning rate",
    "valid/ndcg@10": "Validation users during the training",
}
"""Scalars of the training that are drawn, with their captions."""
COLORS = {"model": "#1f4e9c", "control": "#c8501e", "base": "#6b8e23", "popularity": "#8a6bb1", "random": "#9a9a9a"}
STYLE = {
    "svg.hashsalt": "trsr",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""The fixed salt makes equal figures equal bytes."""


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


def to_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element, without dates."""
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def recall_by_k(positions: Mapping[str, np.ndarray]) -> Figure:
    """Recall at every K.

    Args:
        positions: per system, the mean share of positives found within K places, shape (max_k,).
    """
    figure, axes = _axes("K", "Recall@K")
    for name, values in positions.items():
        line = "-" if name == "model" else "--"
        axes.plot(np.arange(1, len(values) + 1), values, line, color=COLORS.get(name), label=SYSTEMS[name])
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    return figure


def metric_by_length(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """A metric and its control, one pair of bars a slice."""
    figure, axes = _axes("items in the history, and how many users", column_title(metric))
    places = np.arange(len(rows))
    model = np.array([row["metrics"][metric] for row in rows])
    axes.bar(places - 0.2, model, 0.4, color=COLORS["model"], label=SYSTEMS["model"])
    if "personalization_gain" in rows[0]:
        control = model - np.array([row["personalization_gain"][metric] for row in rows])
        axes.bar(places + 0.2, control, 0.4, color=COLORS["control"], label=SYSTEMS["control"])
    axes.set_xticks(places, [f"{row['value']}\n{_short(row['num_users'])}" for row in rows])
    axes.margins(y=0.3)  # room for the legend
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def reliability_plot(calibration: Mapping[str, Any]) -> Figure:
    """Observed against predicted share of positives, per bin."""
    figure, axes = _axes("predicted probability", "share of positives")
    axes.plot([0, 1], [0, 1], ":", color="#9a9a9a")
    for (name, entry), color in zip(calibration.items(), (COLORS["control"], COLORS["model"]), strict=False):
        bins = entry["bins"]
        label = f"{name} (ECE {entry['ece']:.3f})"
        axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "o-", ms=4, color=color, label=label)
    axes.legend(frameon=False, fontsize=8)
    return figure


def score_histogram(scores: np.ndarray, labels: np.ndarray) -> Figure:
    """Distribution of the log-odds of positives and negatives; the outer bins hold the extreme ones too, of which
    among many users a few would squeeze all others into one bin."""
    figure, axes = _axes("log-odds", "density")
    kinds = [scores[labels == label] for label in (0, 1)]
    low, high = np.quantile(np.concatenate([np.quantile(kind, [TAIL, 1 - TAIL]) for kind in kinds]), [0, 1])
    edges = np.linspace(low - 1e-6, high + 1e-6, 41)
    for kind, name, color in zip(kinds, ("negatives", "positives"), (COLORS["random"], COLORS["model"]), strict=True):
        axes.hist(np.clip(kind, low, high), edges, density=True, alpha=0.6, color=color, label=name)
    axes.legend(frameon=False, fontsize=8)
    return figure


def training_curve(values: Mapping[int, float], name: str) -> Figure:
    """A scalar of the training by step; of a long one means of neighbouring log lines."""
    figure, axes = _axes("optimizer step", name)
    groups = np.array_split(np.array(list(values.items())), min(len(values), MAX_POINTS))
    steps, means = np.array([group.mean(axis=0) for group in groups]).T
    axes.plot(steps, means, color=COLORS["model"], lw=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _short(count: int) -> str:
    """At most four characters below ten million: there is no room for more beside each other."""
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def _axes(x_label: str, y_label: str) -> tuple[Figure, Any]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.0))
        axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes
