"""Whether popularity or age alone tells positives from negatives: then a model may learn that instead of the user."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trsr_dist.records import Candidate

SEPARATES = 0.1
"""A mean AUC this far from one half, and beyond two standard errors, is a warning."""
NEVER = np.iinfo(np.int64).max
"""Stands for the time of an item that nobody is known to have met: newer than all."""


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """What the run's histories say of the items."""

    numbers: Mapping[str, tuple[int, int]]
    """By item id: clicks of train users, and Unix seconds at which the item was first met (0: unknown)."""
    drawn_by_clicks: bool
    """Negatives are drawn in proportion to clicks (data.candidates: popularity, targets)."""


@dataclass(slots=True)
class Shortcut:
    """AUC of one number, user by user."""

    name: str
    aucs: array = field(default_factory=lambda: array("d"))

    def add(self, positives: Sequence[int], negatives: Sequence[int]) -> None:
        """One user's numbers; a user without either kind counts for nothing."""
        if positives and negatives:
            self.aucs.append(user_auc(positives, negatives))

    @property
    def auc(self) -> float:
        """Mean over the users."""
        return float(np.mean(self.aucs))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(np.std(self.aucs) / np.sqrt(len(self.aucs)))

    @property
    def separates(self) -> bool:
        return abs(self.auc - 0.5) > max(SEPARATES, 2 * self.error)


def user_auc(positives: Sequence[int], negatives: Sequence[int]) -> float:
    """Share of the pairs in which the positive has the larger number; equal ones count half."""
    difference = np.sign(np.subtract.outer(np.asarray(positives, np.int64), np.asarray(negatives, np.int64)))
    return float((difference.mean() + 1) / 2)


class Shortcuts:
    """Popularity and newness of the candidates.

    A train target's popularity holds the target's own click, which is taken off; but not where negatives are drawn from
    the same clicks, since each of them was drawn by one of its own.

    Args:
        facts: of the items.
        is_train: the split is the one whose clicks are counted.
    """

    def __init__(self, facts: ItemFacts, is_train: bool) -> None:
        self._numbers = facts.numbers
        self._own_click = int(is_train and not facts.drawn_by_clicks)
        self._has_times = any(first_seen for _, first_seen in facts.numbers.values())
        self._popularity = Shortcut("popularity")
        self._newness = Shortcut("item age (newer is higher)")
        self.num_unknown = 0
        """Candidates that the histories lack."""

    @property
    def measured(self) -> list[Shortcut]:
        """Those of which anything is known."""
        return [shortcut for shortcut in (self._popularity, self._newness) if shortcut.aucs]

    def add(self, candidates: Sequence[Candidate]) -> None:
        """The candidates of one user."""
        known = [candidate for candidate in candidates if candidate.item in self._numbers]
        self.num_unknown += len(candidates) - len(known)
        positives = [self._numbers[candidate.item] for candidate in known if candidate.label]
        negatives = [self._numbers[candidate.item] for candidate in known if not candidate.label]
        self._popularity.add([clicks - self._own_click for clicks, _ in positives], [clicks for clicks, _ in negatives])
        if self._has_times:
            self._newness.add([seen or NEVER for _, seen in positives], [seen or NEVER for _, seen in negatives])
