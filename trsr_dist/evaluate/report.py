"""The report: one HTML page with tables, figures, examples, config and provenance; it loads nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from trsr_dist.evaluate.metrics import position_probabilities
from trsr_dist.evaluate.plots import (
    metric_by_length,
    recall_by_k,
    reliability_plot,
    score_histogram,
    to_svg,
    training_curve,
)
from trsr_dist.evaluate.results import ScoredSystems
from trsr_dist.evaluate.table import SYSTEMS, column_title, gain_line
from trsr_dist.files import atomic_file
from trsr_dist.records import Sample

NUM_EXAMPLES = 10
MAX_K = 20
PLOTTED = ("model", "base", "control", "popularity")


@dataclass(frozen=True, slots=True)
class ReportParts:
    """What a report shows."""

    results: Mapping[str, Any]
    figures: Mapping[str, Figure]
    """By caption."""
    examples: Sequence[Mapping[str, Any]]
    config: str


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
    figures = {
        "Recall by K": recall_by_k(recall_curves(systems)),
        "By length of the history": metric_by_length(results["slices"], metric),
        "Calibration": reliability_plot(results["calibration"]),
        "Distribution of scores": score_histogram(scores, labels),
    }
    for name, caption in (("train/loss", "Training loss"), ("train/learning_rate", "Learning rate")):
        rows = [row for row in training if name in row]
        if rows:
            figures[caption] = training_curve([row["step"] for row in rows], [row[name] for row in rows], name)
    return figures


def recall_curves(systems: ScoredSystems) -> dict[str, np.ndarray]:
    """Mean Recall@K of some systems for K from 1 to 20 or the shortest candidate list."""
    length = min(MAX_K, min(map(len, systems.labels)))
    curves = {"random": _recall([np.zeros(len(labels)) for labels in systems.labels], systems.labels, length)}
    for name in PLOTTED:
        if name in systems.scores:
            curves[name] = _recall(systems.scores[name], systems.labels, length)
    return curves


def build_example(sample: Sample, scores: np.ndarray, control: np.ndarray | None) -> dict[str, Any]:
    """One user: what the model saw, and the candidates by falling log-odds.

    Args:
        sample: the user.
        scores: log-odds of the candidates, shape (num_candidates,).
        control: those under another user's text; None where not scored.
    """
    order = np.argsort(-scores, kind="stable").tolist()
    ranked = [
        {
            "label": sample.candidates[place].label,
            "text": sample.candidates[place].text,
            "score": float(scores[place]),
            "control": None if control is None else float(control[place]),
        }
        for place in order
    ]
    rank = 1 + next(place for place, row in enumerate(ranked) if row["label"])
    return {"user": sample.user, "summary": sample.summary, "recent": sample.recent, "ranked": ranked, "rank": rank}


def write_report(path: Path, parts: ReportParts) -> None:
    """Write the page; every text is escaped."""
    page = Environment(loader=PackageLoader("trsr_dist.evaluate", "."), autoescape=True, trim_blocks=True)
    results = parts.results
    columns = list(results["metrics"])
    middle = columns[1] if len(columns) > 1 else columns[0]
    gain = results["personalization_gain"].get(middle)
    with atomic_file(path) as stream:
        stream.write(
            page.get_template("report.html").render(
                results=results,
                columns=columns,
                titles={name: column_title(name) for name in columns},
                systems=system_rows(results),
                verdict=gain_line(gain, middle) if gain else "",
                verdict_class="" if gain and gain["low"] > 0 else "none",
                slice_columns=[middle, *(name for name in columns if name in ("ndcg@10", "auc"))],
                plots=[{"caption": caption, "svg": to_svg(figure)} for caption, figure in parts.figures.items()],
                examples=parts.examples,
                provenance=json.dumps(results["provenance"], indent=2, ensure_ascii=False),
                config=parts.config,
            )
        )


def system_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the main table, in its order."""
    metrics = {**results["baselines"], "model": results["metrics"]}
    confidence = {**results["baseline_confidence"], "model": results["confidence"]}
    return [
        {"key": name, "name": title, "metrics": metrics[name], "confidence": confidence[name]}
        for name, title in SYSTEMS.items()
        if name in metrics
    ]


def _recall(scores: Sequence[np.ndarray], labels: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Mean over users of the share of positives within K places, shape (length,)."""
    total = np.zeros(length)
    for user_scores, user_labels in zip(scores, labels, strict=True):
        hits, _ = position_probabilities(user_scores, user_labels)
        total += np.cumsum(hits)[:length] / user_labels.sum()
    return total / len(labels)
