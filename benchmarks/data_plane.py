"""The data plane on up to 1,024 ranks, simulated: how even the steps are, what stragglers and failures cost.

Rows and their dealing are the stream's own; only the ranks and their clocks are made up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from benchmarks.common import Row
from benchmarks.mixes import AMAZON, MIND, Mix
from trsr_dist.hashing import random_stream
from trsr_dist.planner.cost import DAY, Restarts, best_interval
from trsr_dist.shards.lengths import Table
from trsr_dist.shards.packing import deal
from trsr_dist.shards.plan import WINDOW_SAMPLES, WindowPlan

NUM_USERS = 200_000
LEAST_USERS = 40_000
"""Fewer do not fill the steps of 1,024 ranks."""
ROW_TOKENS, ROWS_PER_STEP, NUM_CANDIDATES = 8192, 2048, 5
RANKS = (8, 64, 256, 1024)
JITTER = 0.05
SAVE, RESTART, DEVICE_DAYS = 10.0, 300.0, 2000.0
"""Seconds of a checkpoint and of a restart, and days between failures of one device: assumed, not measured."""
FAILURES = 2000


def simulations(scale: float) -> list[Row]:
    """Both data sets' lengths, and failures; ``scale`` multiplies the users."""
    num_users = max(LEAST_USERS, round(NUM_USERS * scale))
    return [row for mix in (MIND, AMAZON) for row in data_plane(mix, num_users)] + failures()


def data_plane(mix: Mix, num_users: int) -> list[Row]:
    """An epoch of users with a data set's lengths on ever more ranks."""
    rows = epoch_rows(mix_windows(mix, num_users, NUM_CANDIDATES, ROW_TOKENS), mix.head)
    fill = rows.tokens.mean() / ROW_TOKENS
    case = f"{num_users:,} users of {mix.name}'s lengths, {len(rows.costs)} rows of {ROW_TOKENS}"
    found = [Row("planner", case, "row fill", fill, "share")]
    for world_size in RANKS:
        loads = divide(rows, ROWS_PER_STEP, world_size)
        whole = Loads(loads.costs[:-1], loads.tokens[:-1])
        case = f"{mix.name}, {world_size} ranks, {len(loads.costs)} steps of {ROWS_PER_STEP} rows"
        note = f"{whole.slowest:.4f} without the last step, which is not full"
        jitter = f"the same, rank speeds vary by {JITTER:.0%} from step to step"
        found += [
            Row("planner", case, "time over evenly divided", loads.slowest, "x", note),
            Row("planner", case, jitter, whole.straggling(JITTER, 0), "x", "without the last step"),
            Row("planner", case, "tokens of the fullest rank over the mean", whole.most_tokens, "x"),
        ]
    return found


def mix_windows(mix: Mix, num_users: int, num_candidates: int, row_tokens: int) -> Iterator[WindowPlan]:
    """Rows of users with a data set's lengths, window by window, as the stream plans them."""
    draw = np.random.default_rng(0)
    for first in range(0, num_users, WINDOW_SAMPLES):
        samples = np.arange(first, min(num_users, first + WINDOW_SAMPLES))
        size = len(samples)
        table = Table(
            samples=samples,
            prefixes=draw.choice(mix.prefixes, size),
            trimmed=np.zeros(size, dtype=bool),
            starts=np.arange(size + 1) * num_candidates,
            suffixes=draw.choice(mix.suffixes, size * num_candidates),
            labels=np.arange(size * num_candidates) % num_candidates == 0,
        )
        yield WindowPlan(table, np.ones(len(table.suffixes), dtype=bool), row_tokens, first, mix.head)


def failures() -> list[Row]:
    """What failing devices cost a job that saves as often as is best."""
    rows = []
    for ranks in RANKS:
        between = DEVICE_DAYS * DAY / ranks
        plan = Restarts(SAVE, best_interval(SAVE, between), RESTART, between)
        work = FAILURES * between
        found = run_with_failures(work, plan, random_stream("failures", ranks)) / work - 1
        case = f"{ranks} devices, one failure each in {DEVICE_DAYS:.0f} days"
        note = f"formula {plan.overhead:.3%}; a checkpoint every {plan.interval / 60:.0f} minutes"
        rows.append(Row("planner", case, "time lost", 100 * found, "%", note))
    return rows


@dataclass(frozen=True, slots=True)
class EpochRows:
    """The rows of an epoch, in the order of its steps."""

    costs: np.ndarray
    """float64, shape (num_rows,): in tokens, the attention included."""
    tokens: np.ndarray
    """int64, shape (num_rows,)."""


@dataclass(frozen=True, slots=True)
class Loads:
    """What each rank has to do in each step, float64, shape (num_steps, world_size)."""

    costs: np.ndarray
    tokens: np.ndarray

    @property
    def slowest(self) -> float:
        """Time of the steps, each as long as its dearest rank takes, over that of evenly divided ones."""
        return float(self.costs.max(axis=1).sum() / self.costs.mean(axis=1).sum())

    @property
    def most_tokens(self) -> float:
        """Tokens of the rank that gets most in the epoch, over the mean."""
        sums = self.tokens.sum(axis=0)
        return float(sums.max() / sums.mean())

    def straggling(self, spread: float, seed: int) -> float:
        """``slowest`` when a rank's speed varies from step to step.

        Args:
            spread: relative standard deviation of a rank's time.
            seed: of the draw.
        """
        factors = np.random.default_rng(seed).normal(1.0, spread, self.costs.shape).clip(0.1)
        return float((self.costs * factors).max(axis=1).sum() / self.costs.mean(axis=1).sum())


def epoch_rows(windows: Iterable[WindowPlan], head: int) -> EpochRows:
    """The rows of some windows; ``head`` tokens are held once a row."""
    costs, tokens = [], []
    for window in windows:
        for row in range(window.num_rows):
            costs.append(window.cost(row))
            tokens.append(head + sum(unit.prefix - head + sum(unit.suffixes) for unit in window.units(row)))
    return EpochRows(np.array(costs), np.array(tokens))


def divide(rows: EpochRows, rows_per_step: int, world_size: int) -> Loads:
    """Deal the rows of every step to the ranks, as the stream does."""
    num_steps = -(-len(rows.costs) // rows_per_step)
    costs, tokens = np.zeros((2, num_steps, world_size))
    for step in range(num_steps):
        first = step * rows_per_step
        for rank, hand in enumerate(deal(rows.costs[first : first + rows_per_step].tolist(), world_size)):
            places = [first + row for row in hand]
            costs[step, rank], tokens[step, rank] = rows.costs[places].sum(), rows.tokens[places].sum()
    return Loads(costs, tokens)


def run_with_failures(work: float, plan: Restarts, draw: Random) -> float:
    """Seconds that ``work`` seconds of training take when failures come at random.

    A failure throws the run back to its last checkpoint; a restart may fail as well.
    """
    clock, done = 0.0, 0.0
    failure = draw.expovariate(1 / plan.between_failures)
    while done < work:
        end = clock + min(plan.interval, work - done) + plan.save
        if end <= failure:
            clock, done = end, done + plan.interval
            continue
        clock = failure
        failure += draw.expovariate(1 / plan.between_failures)
        while failure < clock + plan.restart:
            clock = failure
            failure += draw.expovariate(1 / plan.between_failures)
        clock += plan.restart
    return clock
