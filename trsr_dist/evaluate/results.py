"""From the outcomes of all systems to the numbers of ``evaluation/{split}.json``. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trsr_dist.evaluate.calibration import calibration
from trsr_dist.evaluate.confidence import bootstrap_interval, paired_differences
from trsr_dist.evaluate.metrics import average
from trsr_dist.evaluate.outcomes import OutcomeTable
from trsr_dist.evaluate.slices import UserFacts, slice_table
from trsr_dist.records import metric_names


@dataclass(frozen=True, slots=True)
class RankedSystems:
    """How every system ranks the same candidates."""

    table: OutcomeTable
    outcomes: dict[str, np.ndarray]
    """By system, of every user, int32, shape (num_users,). ``model`` is the one under evaluation."""
    num_candidates: int
    """Of all users."""


@dataclass(frozen=True, slots=True)
class ModelScores:
    """The model's log-odds of all candidates."""

    scores: np.ndarray
    """float32, shape (num_candidates,)."""
    labels: np.ndarray
    """int8, of the same shape."""


@dataclass(frozen=True, slots=True)
class ResultSettings:
    """How the numbers are computed."""

    top_k: tuple[int, ...]
    num_samples: int
    """Bootstrap resamples; 0: no intervals."""
    seed: int
    train_negatives: float | None
    """Negatives per positive that the model was trained with; None where unknown, or where the loss gives the
    log-odds no scale."""


def build_results(
    systems: RankedSystems, model: ModelScores, facts: UserFacts, settings: ResultSettings
) -> dict[str, Any]:
    """All numbers of one evaluation; equal input gives equal bytes.

    Args:
        systems: on the shards' own candidates.
        model: its scores of them.
        facts: of each user, for the slices.
        settings: cut-offs, resamples, seed.
    """
    names, outcomes = metric_names(settings.top_k), systems.outcomes
    slices = slice_table(
        facts, systems.table, outcomes["model"], outcomes.get("control"), names, settings.num_samples, settings.seed
    )
    return system_results(systems, settings) | {
        "calibration": calibration(model.scores, model.labels, settings.train_negatives),
        "slices": slices,
    }


def system_results(systems: RankedSystems, settings: ResultSettings) -> dict[str, Any]:
    """The systems' metrics on one kind of candidate lists, with intervals and paired differences."""
    outcomes = systems.outcomes
    others = [name for name in outcomes if name != "model"]
    return {
        "num_users": len(outcomes["model"]),
        "num_candidates": systems.num_candidates,
        "metrics": _means(systems, "model", settings),
        "confidence": _intervals(systems, "model", settings),
        "tie_rate": _tie_rate(systems, "model"),
        "baselines": {name: _means(systems, name, settings) for name in others},
        "baseline_confidence": {name: _intervals(systems, name, settings) for name in others},
        "baseline_tie_rate": {name: _tie_rate(systems, name) for name in others if name != "random"},
        "personalization_gain": _differences(systems, "control", settings) if "control" in others else {},
        "differences": {name: _differences(systems, name, settings) for name in others if name != "control"},
    }


def _named(settings: ResultSettings, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(metric_names(settings.top_k), values, strict=True))


def _means(systems: RankedSystems, name: str, settings: ResultSettings) -> dict[str, float]:
    return _named(settings, average(*systems.table.counted(systems.outcomes[name])))


def _intervals(systems: RankedSystems, name: str, settings: ResultSettings) -> dict[str, list[float]]:
    if not settings.num_samples:
        return {}
    found = systems.table.counted(systems.outcomes[name])
    return _named(settings, bootstrap_interval(*found, settings.num_samples, settings.seed).tolist())


def _differences(systems: RankedSystems, other: str, settings: ResultSettings) -> dict[str, dict[str, float]]:
    """The model minus another system, paired by user; without resamples the means alone."""
    found = systems.table.paired(systems.outcomes["model"], systems.outcomes[other])
    if not settings.num_samples:
        return _named(settings, [{"mean": mean} for mean in average(*found)])
    differences = paired_differences(*found, settings.num_samples, settings.seed)
    return _named(settings, [asdict(difference) for difference in differences])


def _tie_rate(systems: RankedSystems, name: str) -> float:
    used, counts = np.unique(systems.outcomes[name], return_counts=True)
    return average(systems.table.tie_rates[used], counts)[0]
