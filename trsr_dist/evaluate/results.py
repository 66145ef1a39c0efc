"""From the scores of all systems to the numbers of ``evaluation/{split}.json``. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trsr_dist.evaluate.calibration import calibration
from trsr_dist.evaluate.confidence import bootstrap_interval, paired_differences
from trsr_dist.evaluate.metrics import average, metric_names, random_metrics, tie_rate, user_metrics
from trsr_dist.evaluate.slices import slice_table


@dataclass(frozen=True, slots=True)
class ScoredSystems:
    """Every system's scores on the same candidates."""

    labels: list[np.ndarray]
    """Per user, shape (num_candidates,)."""
    scores: dict[str, list[np.ndarray]]
    """By system; ``model`` is the one under evaluation. Per user, shape (num_candidates,)."""


@dataclass(frozen=True, slots=True)
class ResultSettings:
    """How the numbers are computed."""

    top_k: tuple[int, ...]
    num_samples: int
    """Bootstrap resamples; 0: no intervals."""
    seed: int
    train_negatives: float | None
    """Negatives per positive that the model was trained with, where known."""


def metric_values(systems: ScoredSystems, top_k: Sequence[int]) -> dict[str, np.ndarray]:
    """Per system, the users' metrics, float64, shape (num_users, num_metrics); ``random`` by its expectation."""
    values = {"random": np.array([random_metrics(labels, top_k) for labels in systems.labels])}
    for name, scores in systems.scores.items():
        pairs = zip(scores, systems.labels, strict=True)
        values[name] = np.array([user_metrics(score, labels, top_k) for score, labels in pairs])
    return values


def build_results(
    systems: ScoredSystems,
    values: Mapping[str, np.ndarray],
    facts: Sequence[Mapping[str, str]],
    settings: ResultSettings,
) -> dict[str, Any]:
    """All numbers of one evaluation; equal input gives equal bytes.

    Args:
        systems: the scores.
        values: what ``metric_values`` made of them.
        facts: of each user, for the slices.
        settings: cut-offs, resamples, seed.
    """
    names = metric_names(settings.top_k)
    scores, labels = np.concatenate(systems.scores["model"]), np.concatenate(systems.labels)
    return system_results(systems, values, settings) | {
        "calibration": calibration(scores, labels, settings.train_negatives),
        "slices": slice_table(facts, values["model"], values.get("control"), names),
    }


def system_results(
    systems: ScoredSystems, values: Mapping[str, np.ndarray], settings: ResultSettings
) -> dict[str, Any]:
    """The systems' metrics on one kind of candidate lists, with intervals and paired differences."""
    names = metric_names(settings.top_k)
    others = {name: value for name, value in values.items() if name != "model"}
    return {
        "num_users": len(systems.labels),
        "num_candidates": sum(map(len, systems.labels)),
        "metrics": _named(names, average(values["model"])),
        "confidence": _intervals(names, values["model"], settings),
        "tie_rate": _tie_rate(systems, "model"),
        "baselines": {name: _named(names, average(value)) for name, value in others.items()},
        "baseline_confidence": {name: _intervals(names, value, settings) for name, value in others.items()},
        "baseline_tie_rate": {name: _tie_rate(systems, name) for name in systems.scores if name != "model"},
        "personalization_gain": _differences(names, values, "control", settings) if "control" in values else {},
        "differences": {name: _differences(names, values, name, settings) for name in others if name != "control"},
    }


def _named(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return dict(zip(names, values, strict=True))


def _intervals(names: Sequence[str], values: np.ndarray, settings: ResultSettings) -> dict[str, list[float]]:
    if not settings.num_samples:
        return {}
    return dict(zip(names, bootstrap_interval(values, settings.num_samples, settings.seed).tolist(), strict=True))


def _differences(
    names: Sequence[str], values: Mapping[str, np.ndarray], other: str, settings: ResultSettings
) -> dict[str, dict[str, float]]:
    """The model minus another system, paired by user."""
    if not settings.num_samples:
        return {}
    found = paired_differences(values["model"], values[other], settings.num_samples, settings.seed)
    return {name: asdict(difference) for name, difference in zip(names, found, strict=True)}


def _tie_rate(systems: ScoredSystems, name: str) -> float:
    pairs = zip(systems.scores[name], systems.labels, strict=True)
    return math.fsum(tie_rate(scores, labels) for scores, labels in pairs) / len(systems.labels)
