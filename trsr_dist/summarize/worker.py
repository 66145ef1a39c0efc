"""One task's share of the job: claims units, hands their users to the scheduler, commits what is finished."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import EngineError
from trsr_dist.log import get_logger
from trsr_dist.prompts.wording import recommend_instruction
from trsr_dist.records import Candidate, Sample
from trsr_dist.summarize.leases import Lease, LeaseFolder
from trsr_dist.summarize.plans import Plan
from trsr_dist.summarize.samples import check_leaks, make_sample, node_provenance
from trsr_dist.summarize.scheduler import Result, Work
from trsr_dist.summarize.units import SplitWork

RESCAN_SECONDS = 0.5
"""Between two looks for a free unit."""

log = get_logger("summarize")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How samples are made; equal recipes on equal histories make equal shards."""

    plan: Callable[[int], Plan]
    """From the number of items to a plan."""
    domain: str
    num_recent: int
    repeated_kept: bool
    """A target that stands in the history is kept and counted, not an error."""
    failed_users: str
    """``fail``, ``skip`` or ``recent_only``."""
    max_failures: int
    provenance: dict[str, Any]
    """Common to all samples."""


@dataclass(slots=True)
class OpenUnit:
    """A unit in work: its users' samples in order, and those still to be started."""

    work: SplitWork
    unit: int
    lease: Lease
    waiting: list[int]
    """Positions of users not yet started, last first."""
    samples: dict[int, Sample] = field(default_factory=dict)
    left: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class Worker:
    """Feeds a scheduler and takes its results.

    Args:
        store: histories.
        works: the splits' units.
        leases: on the units.
        recipe: how samples are made.
        task: this task's name.
        first: where in the ring of units this task starts, 0 to 1.
    """

    def __init__(
        self,
        store: HistoryStore,
        works: Sequence[SplitWork],
        leases: LeaseFolder,
        recipe: Recipe,
        task: str,
        first: float,
    ) -> None:
        self.store = store
        self.leases = leases
        self.recipe = recipe
        self.task = task
        units = [(work, unit) for work in works for unit in range(work.num_units)]
        start = int(first * len(units))
        self._ring = units[start:] + units[:start]
        self._open: list[OpenUnit] = []
        self._last_scan = float("-inf")
        self.users_done = 0
        self.failures = 0
        self.units_done = 0

    @property
    def open_units(self) -> list[OpenUnit]:
        return self._open

    def next_work(self) -> Work | None:
        """The next user of a unit held here, claiming another unit when all are started; None if none is free."""
        unit = next((unit for unit in self._open if unit.waiting), None) or self._claim()
        if unit is None:
            return None
        position = unit.waiting.pop()
        row = self.store.user(unit.work.split, position)
        items = [self.store.catalogue.text(item) for item in row.history]
        return Work((unit, position, row), self.recipe.plan(len(items)), items)

    def take(self, result: Result) -> None:
        """Keep a user's result; commit the unit when it was the last one.

        Raises:
            EngineError: the user failed and the policy or the tolerance says stop.
            DataError: a target stands in the history.
        """
        unit, position, row = result.tag
        self.users_done += 1
        unit.left -= 1
        if result.error:
            self._note_failure(unit, row.user, result.error)
        if not (result.error and self.recipe.failed_users == "skip"):
            unit.samples[position] = self._sample(unit, row, result)
        if not unit.left:
            self._finish(unit)

    def abandon_lost(self) -> None:
        """Stop feeding users of units whose lease has passed to another task."""
        for unit in [unit for unit in self._open if unit.lease.lost and unit.waiting]:
            unit.left -= len(unit.waiting)
            unit.waiting.clear()
            if not unit.left:
                self._finish(unit)

    def _claim(self) -> OpenUnit | None:
        now = time.monotonic()
        if now - self._last_scan < RESCAN_SECONDS:
            return None
        self._ring = [(work, unit) for work, unit in self._ring if not work.is_done(unit)]
        mine = {(open_unit.work.split, open_unit.unit) for open_unit in self._open}
        for work, unit in self._ring:
            if (work.split, unit) in mine:
                continue
            lease = self.leases.acquire(f"{work.folder.name}-{unit:06d}")
            if lease is None:
                continue
            if work.is_done(unit):
                self.leases.release(lease)
                continue
            users = work.users(unit)
            self._open.append(OpenUnit(work, unit, lease, list(reversed(users)), left=len(users)))
            return self._open[-1]
        self._last_scan = now
        return None

    def _note_failure(self, unit: OpenUnit, user: str, reason: str) -> None:
        self.failures += 1
        unit.failed.append({"user": user, "reason": reason})
        log.warning("no summary for user %s: %s", user, reason)
        if self.recipe.failed_users == "fail":
            raise EngineError(
                f"user {user!r}: {reason}; set summarize.failed_users to skip or recent_only to go on without"
            )
        if self.failures > self.recipe.max_failures:
            raise EngineError(
                f"{self.failures} users failed, the last one {user!r}: {reason}; summarize.max_failures allows "
                f"{self.recipe.max_failures}"
            )

    def _sample(self, unit: OpenUnit, row: UserRow, result: Result) -> Sample:
        catalogue = self.store.catalogue
        history = [catalogue.item(item) for item in row.history]
        chosen = [catalogue.item(item) for item in row.candidates]
        targets = [item for item, label in zip(chosen, row.labels, strict=True) if label]
        facts = check_leaks(row.user, history, targets, self.recipe.repeated_kept)
        nodes = node_provenance(self.recipe.plan(len(history)), result.records)
        unit.counts.update(repeated_targets=facts.repeated_targets, near_duplicates=facts.near_duplicates)
        unit.counts.update({f"flag_{flag}": 1 for flag in nodes["flags"]})
        unit.counts.update(nodes=len(result.records), sampled=nodes["sampled"], words_cut=nodes["words_cut"])
        return make_sample(
            user=row.user,
            instruction=recommend_instruction(self.recipe.domain),
            history=history,
            candidates=[Candidate(item.id, item.text, label) for item, label in zip(chosen, row.labels, strict=True)],
            num_recent=self.recipe.num_recent,
            records=result.records,
            provenance=self.recipe.provenance | nodes | ({"failed": result.error} if result.error else {}),
        )

    def _finish(self, unit: OpenUnit) -> None:
        self._open.remove(unit)
        if not self.leases.is_held(unit.lease):
            log.warning("lost the lease on %s unit %d; dropped it", unit.work.split, unit.unit)
        else:
            samples = [unit.samples[position] for position in sorted(unit.samples)]
            facts = {"num_users": len(samples), "failed": unit.failed, "counts": dict(sorted((+unit.counts).items()))}
            self.units_done += unit.work.commit(unit.unit, samples, facts, self.task)
        self.leases.release(unit.lease)
