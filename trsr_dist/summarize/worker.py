"""One task's share of the job: claims units, hands their users to the scheduler, commits what is finished.

A user's sample holds history, summary and provenance; a target that is among the sources of its summary is an error.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError, EngineError
from trsr_dist.hashing import digest
from trsr_dist.leases import Lease, LeaseFolder
from trsr_dist.log import get_logger
from trsr_dist.printable import in_one_line
from trsr_dist.prompts.text import recommend_instruction
from trsr_dist.records import Item, Sample
from trsr_dist.summarize.plans.graph import Plan
from trsr_dist.summarize.scheduler import Result, Work
from trsr_dist.summarize.units import SplitWork
from trsr_dist.words import comparable

LOOKED_AT = 64
"""Leases of others that a task without work reads at once: all leases, read by all tasks, would be the square."""

log = get_logger("summarize")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How samples are made; equal recipes on equal histories make equal shards."""

    plan: Callable[[int], Plan]
    """From the number of items to a plan."""
    text: Callable[[Sequence[str]], str]
    """From the items' texts, oldest first, to what stands in place of a summary where the plan makes none."""
    domain: str
    num_recent: int
    repeated_kept: bool
    """A target that stands in the history is kept and counted, not an error."""
    failed_users: str
    """``fail``, ``skip`` or ``recent_only``."""
    max_failures: int
    """More failed users than this, of all tasks together, stop the job."""
    provenance: dict[str, Any]
    """Common to all samples."""


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What a user's sample adds to the counts of its unit."""

    repeated_targets: int
    """Targets consumed before, which data.repeated_target kept."""
    near_duplicates: int
    """Targets whose text equals that of another item in the history."""


@dataclass(slots=True)
class OpenUnit:
    """A unit in work: its users' samples in order, and those still to be started."""

    work: SplitWork
    unit: int
    lease: Lease
    waiting: list[int]
    """Positions of users not yet started, last first."""
    samples: dict[int, Sample] = field(default_factory=dict)
    num_finished: int = 0
    left: int = 0
    failed: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By the user's position: the manifest must not tell who finished first."""
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Started:
    """A user on the way through the scheduler."""

    unit: OpenUnit
    position: int
    row: UserRow
    history: list[Item]
    facts: SampleFacts


class Worker:
    """Feeds a scheduler and takes its results.

    Args:
        store: histories.
        works: the splits' units.
        leases: on the units.
        recipe: how samples are made.
        task: this task's name.
        first: where in the ring of units this task starts, 0 to 1.
        refresh: called for each claimed unit: reads the texts that an earlier holder has left.
    """

    def __init__(
        self,
        store: HistoryStore,
        works: Sequence[SplitWork],
        leases: LeaseFolder,
        recipe: Recipe,
        task: str,
        first: float,
        refresh: Callable[[], None],
    ) -> None:
        self.store = store
        self.works = works
        self.leases = leases
        self.recipe = recipe
        self.task = task
        self.refresh = refresh
        units = [(work, unit) for work in works for unit in range(work.num_units)]
        start = int(first * len(units))
        self._ring = units[start:] + units[:start]
        self._open: list[OpenUnit] = []
        self._last_scan = float("-inf")
        self._num_looked_at = 0

    @property
    def num_uncommitted(self) -> int:
        """Users finished in units that are not committed yet."""
        return sum(unit.num_finished for unit in self._open)

    @property
    def uncommitted_failures(self) -> list[dict[str, Any]]:
        """Failed users of units that are not committed yet."""
        return [failure for unit in self._open for failure in unit.failed.values()]

    def next_work(self) -> Work | None:
        """The next user of a unit held here, claiming another unit when all are started; None if none is free.

        Raises:
            DataError: a target stands in the history; nothing was generated for it.
        """
        unit = next((unit for unit in self._open if unit.waiting), None) or self._claim()
        if unit is None:
            return None
        position = unit.waiting.pop()
        row, catalogue = self.store.user(unit.work.split, position), self.store.catalogue
        history = [catalogue.item(item) for item in row.history]
        targets = [catalogue.item(item) for item, label in zip(row.candidates, row.labels, strict=True) if label]
        facts = check_leaks(row.user, history, targets, self.recipe.repeated_kept)
        started = Started(unit, position, row, history, facts)
        return Work(started, self.recipe.plan(len(history)), [item.text for item in history])

    def take(self, result: Result) -> None:
        """Keep a user's result; commit the unit when it was the last one.

        Raises:
            EngineError: the user failed and the policy or the tolerance says stop.
        """
        started: Started = result.tag
        unit = started.unit
        unit.num_finished += 1
        unit.left -= 1
        if (failure := result.failure) is not None:
            user = started.row.user
            facts = {"user": user, "node": failure.node, "key": failure.key, "reason": failure.reason}
            unit.failed[started.position] = facts
            log.warning("no summary for user %s: node %d: %s", in_one_line(user, 100), failure.node, failure.reason)
            if self.recipe.failed_users == "fail":
                raise EngineError(
                    f"user {user!r}: node {failure.node}: {failure.reason}; set summarize.failed_users to skip or "
                    "recent_only to go on without"
                )
            num_failed = len(self.uncommitted_failures) + sum(
                len(work.failures(self.leases.look_seconds)) for work in self.works
            )
            if num_failed > self.recipe.max_failures:
                raise EngineError(
                    f"{num_failed} users failed, the last one {user!r}: {failure.reason}; summarize.max_failures "
                    f"allows {self.recipe.max_failures}"
                )
        if not (result.failure and self.recipe.failed_users == "skip"):
            unit.samples[started.position] = self._sample(started, result)
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
        if now - self._last_scan < self.leases.look_seconds:
            return None
        committed = {work.split: work.committed(self.leases.look_seconds) for work in self.works}
        self._ring = [(work, unit) for work, unit in self._ring if unit not in committed[work.split]]
        for work, unit in self._claimable():
            lease = self.leases.acquire(_lease_name(work, unit))
            if lease is None:
                continue
            if work.is_done(unit):
                self.leases.release(lease)
                continue
            self.refresh()
            users = work.users(unit)
            self._open.append(OpenUnit(work, unit, lease, list(reversed(users)), left=len(users)))
            return self._open[-1]
        self._last_scan = now
        return None

    def _claimable(self) -> Iterator[tuple[SplitWork, int]]:
        """Units that nobody has; then some of those that others have, who may be dead: other ones at each look."""
        mine = {(open_unit.work.split, open_unit.unit) for open_unit in self._open}
        taken, held = self.leases.taken(), []
        for work, unit in self._ring:
            if (work.split, unit) in mine:
                continue
            if _lease_name(work, unit) in taken:
                held.append((work, unit))
            else:
                yield work, unit
        self._num_looked_at += LOOKED_AT
        start = self._num_looked_at % max(len(held), 1)
        yield from (held[start:] + held[:start])[:LOOKED_AT]

    def _sample(self, started: Started, result: Result) -> Sample:
        row, unit = started.row, started.unit
        plan = self.recipe.plan(len(started.history))
        nodes = node_provenance(plan if result.records else (), result.records, started.history)
        unit.counts.update(
            repeated_targets=started.facts.repeated_targets, near_duplicates=started.facts.near_duplicates
        )
        unit.counts.update({f"flag_{flag}": 1 for flag in nodes["flags"]})
        unit.counts.update(nodes=len(result.records), sampled=nodes["sampled"], words_cut=nodes["words_cut"])
        texts = [item.text for item in started.history]
        facts = {"failed": result.failure.reason} if result.failure else {}
        return Sample(
            user=row.user,
            instruction=recommend_instruction(self.recipe.domain),
            summary=result.records[-1]["text"] if result.records else self.recipe.text(texts),
            recent=tuple(texts[max(0, len(texts) - self.recipe.num_recent) :]),
            candidates=self.store.candidates(row),
            provenance=self.recipe.provenance | nodes | facts | {"history": [item.id for item in started.history]},
        )

    def _finish(self, unit: OpenUnit) -> None:
        self._open.remove(unit)
        if not self.leases.is_held(unit.lease):
            log.warning("lost the lease on %s unit %d; dropped it", unit.work.split, unit.unit)
        else:
            samples = [unit.samples[position] for position in sorted(unit.samples)]
            failed = [unit.failed[position] for position in sorted(unit.failed)]
            facts = {"num_users": len(samples), "failed": failed, "counts": dict(sorted((+unit.counts).items()))}
            unit.work.commit(unit.unit, samples, facts, self.task)
        self.leases.release(unit.lease)


def _lease_name(work: SplitWork, unit: int) -> str:
    return f"{work.folder.name}-{unit:06d}"


def check_leaks(user: str, history: Sequence[Item], targets: Sequence[Item], repeated_kept: bool) -> SampleFacts:
    """Compare a user's targets with the sources of the summary.

    Raises:
        DataError: a target is among them, and data.repeated_target is not ``keep``.
    """
    ids, texts = {item.id for item in history}, {comparable(item.text) for item in history}
    repeated = [item.id for item in targets if item.id in ids]
    if repeated and not repeated_kept:
        raise DataError(
            f"user {user!r}: target {repeated[0]!r} is also in the history that the summary is made from; prepare the "
            "data again, or count such users in with data.repeated_target=keep"
        )
    near = sum(item.id not in ids and comparable(item.text) in texts for item in targets)
    return SampleFacts(len(repeated), near)


def node_provenance(plan: Plan, records: Sequence[dict[str, Any]], history: Sequence[Item]) -> dict[str, Any]:
    """What a summary was made of: its nodes, its blocks, and the quality flags met on the way.

    A node is (kind, span of the history, key of the text, hash of the prompt); a block's id is the hash of its items'
    ids.
    """
    nodes = [
        [node.kind, node.start, node.stop, record["key"], record["prompt"]]
        for node, record in zip(plan, records, strict=bool(records))
    ]
    spans = [(node.start, node.stop) for node in plan if node.start < node.stop]
    return {
        "blocks": [digest([item.id for item in history[start:stop]])[:16] for start, stop in spans],
        "nodes": nodes,
        "flags": sorted({flag for record in records for flag in record["flags"]}),
        "sampled": sum(record.get("sampled", False) for record in records),
        "words_cut": sum(record.get("words_cut", 0) for record in records),
    }
