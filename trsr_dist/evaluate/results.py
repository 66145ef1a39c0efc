"""From the outcomes of all systems to the numbers of ``evaluation/{split}.json``: results, slices, examples. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trsr_dist.evaluate.metrics import OutcomeTable, average
from trsr_dist.evaluate.statistics import bootstrap_interval, calibration, paired_differences
from trsr_dist.records import Sample, metric_names

MIN_USERS = 31
"""Slices with fewer users are not shown: their figures say nothing."""
LENGTH_BOUNDS = (5, 10, 15, 20, 30, 50)
ABSENT = -1
NUM_EXAMPLES = 10
SHOWN_ROWS = 20
"""Candidates of an example that are shown, and positives below them."""
SHOWN_CHARACTERS = 2000
"""Of one text."""


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

    def named(self, values: Sequence[Any]) -> dict[str, Any]:
        """One value a metric by its name."""
        return dict(zip(metric_names(self.top_k), values, strict=True))

    def means(self, rows: np.ndarray, counts: np.ndarray) -> dict[str, float]:
        """Over users, by metric; rows and counts as of ``OutcomeTable.counted``."""
        return self.named(average(rows, counts))

    def intervals(self, rows: np.ndarray, counts: np.ndarray) -> dict[str, list[float]]:
        """Of the means, at 95%; empty without resamples."""
        if not self.num_samples:
            return {}
        return self.named(bootstrap_interval(rows, counts, self.num_samples, self.seed).tolist())


class UserFacts:
    """What the slices tell users apart by, such as {"history length": "6-10", "trimmed": "no"}: a number a user."""

    def __init__(self) -> None:
        self._num_users = 0
        self._columns: dict[str, tuple[dict[str, int], list[int]]] = {}
        """By kind: codes of the values, and of the users' values."""

    def add(self, facts: Mapping[str, str]) -> None:
        """The next user's; a kind that is left out puts the user in none of its slices."""
        for kind, value in facts.items():
            if kind not in self._columns:
                self._columns[kind] = {}, []
            values, codes = self._columns[kind]
            if len(codes) < self._num_users:
                codes += [ABSENT] * (self._num_users - len(codes))
            codes.append(values.setdefault(value, len(values)))
        self._num_users += 1

    def slices(self) -> list[tuple[str, str, np.ndarray]]:
        """Kind, value and users (int64, positions) of each slice that is large enough, in the order of the tables."""
        found = []
        for kind, (values, found_codes) in self._columns.items():
            codes = np.array(found_codes)
            order = np.argsort(codes, kind="stable")
            starts = np.searchsorted(codes[order], np.arange(len(values) + 1))
            for value, code in values.items():
                if starts[code + 1] - starts[code] >= MIN_USERS:
                    found.append((kind, value, order[starts[code] : starts[code + 1]]))
        return sorted(found, key=lambda entry: _slice_order(*entry[:2]))


def _slice_order(kind: str, value: str) -> tuple[str, int, str]:
    lead = value.removeprefix("over ").split("-")[0]
    return kind, int(lead) + value.startswith("over") if lead.isdecimal() else 0, value


def length_slice(num_items: int) -> str:
    """Name of the history length's slice, such as ``11-15``."""
    low = 1
    for high in LENGTH_BOUNDS:
        if num_items <= high:
            return f"{low}-{high}"
        low = high + 1
    return f"over {LENGTH_BOUNDS[-1]}"


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
    return system_results(systems, settings) | {
        "calibration": calibration(model.scores, model.labels, settings.train_negatives),
        "slices": slice_table(facts, systems, settings),
    }


def system_results(systems: RankedSystems, settings: ResultSettings) -> dict[str, Any]:
    """The systems' metrics on one kind of candidate lists, with intervals and paired differences."""
    others, model = [name for name in systems.outcomes if name != "model"], systems.outcomes["model"]

    def differences(other: str) -> dict[str, Any]:
        """The model minus another system, paired by user; without resamples the means alone."""
        found = systems.table.paired(model, systems.outcomes[other])
        if not settings.num_samples:
            return settings.named([{"mean": mean} for mean in average(*found)])
        paired = paired_differences(*found, settings.num_samples, settings.seed)
        return settings.named([asdict(difference) for difference in paired])

    counted = systems.table.counted(model)
    return baseline_results(systems, settings) | {
        "metrics": settings.means(*counted),
        "confidence": settings.intervals(*counted),
        "tie_rate": _tie_rate(systems, "model"),
        "personalization_gain": differences("control") if "control" in others else {},
        "differences": {name: differences(name) for name in others if name != "control"},
    }


def baseline_results(systems: RankedSystems, settings: ResultSettings) -> dict[str, Any]:
    """The metrics of all but the model, with intervals."""
    counted = {name: systems.table.counted(found) for name, found in systems.outcomes.items() if name != "model"}
    return {
        "num_users": len(systems.outcomes["random"]),
        "num_candidates": systems.num_candidates,
        "baselines": {name: settings.means(*found) for name, found in counted.items()},
        "baseline_confidence": {name: settings.intervals(*found) for name, found in counted.items()},
        "baseline_tie_rate": {name: _tie_rate(systems, name) for name in counted if name != "random"},
    }


def _tie_rate(systems: RankedSystems, name: str) -> float:
    used, counts = np.unique(systems.outcomes[name], return_counts=True)
    return average(systems.table.tie_rates[used], counts)[0]


def slice_table(facts: UserFacts, systems: RankedSystems, settings: ResultSettings) -> list[dict[str, Any]]:
    """One row per fact and value that more than 30 users share; the gain where the control was scored.

    Args:
        facts: of all users.
        systems: model and control.
        settings: cut-offs, resamples, seed.
    """
    table, model, control = systems.table, systems.outcomes["model"], systems.outcomes.get("control")
    rows = []
    for kind, value, users in facts.slices():
        row = {"slice": kind, "value": value, "num_users": len(users)}
        found = table.counted(model[users])
        row["metrics"] = settings.means(*found)
        if settings.num_samples:
            row["confidence"] = settings.intervals(*found)
        if control is not None:
            gains = table.paired(model[users], control[users])
            row["personalization_gain"] = settings.means(*gains)
            if settings.num_samples:
                row["gain_confidence"] = settings.intervals(*gains)
        rows.append(row)
    return rows


def build_example(sample: Sample, scores: np.ndarray, control: np.ndarray | None) -> dict[str, Any]:
    """One user: what the model saw, and the first candidates by falling log-odds with all positives, up to a limit.

    Args:
        sample: the user.
        scores: log-odds of the candidates, shape (num_candidates,).
        control: those under another user's text; None where not scored.

    Returns:
        ``rows`` hold a candidate with its rank, or ``left_out``, how many candidates are not shown at this place.
    """
    order = np.argsort(-scores, kind="stable").tolist()
    positives = [rank for rank, place in enumerate(order, 1) if sample.candidates[place].label]
    below = [rank for rank in positives if rank > SHOWN_ROWS][:SHOWN_ROWS]
    shown = [*range(1, min(SHOWN_ROWS, len(order)) + 1), *below]
    rows = {
        rank: {
            "rank": rank,
            "label": sample.candidates[order[rank - 1]].label,
            "text": shorten(sample.candidates[order[rank - 1]].text),
            "score": float(scores[order[rank - 1]]),
            "control": None if control is None else float(control[order[rank - 1]]),
        }
        for rank in shown
    }
    return {
        "user": sample.user,
        "summary": shorten(sample.summary),
        "recent": [shorten(text) for text in sample.recent],
        "rows": list(_with_gaps(shown, rows, len(order))),
        "rank": positives[0],
        "num_candidates": len(order),
    }


def shorten(text: str) -> str:
    """The text, or its head and how much is left out."""
    left_out = len(text) - SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:SHOWN_CHARACTERS]}... ({left_out:,} characters more)"


def _with_gaps(shown: Sequence[int], rows: dict[int, dict[str, Any]], last: int) -> Iterator[dict[str, Any]]:
    for before, rank in zip([0, *shown], [*shown, last + 1], strict=True):
        if rank - before > 1:
            yield {"left_out": rank - before - 1}
        if rank in rows:
            yield rows[rank]
