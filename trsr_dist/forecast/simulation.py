"""The data plane on many ranks, simulated: how even the steps are, what stragglers and failures cost. Pure.

Rows and their dealing are the stream's own; only the ranks and their clocks are made up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import numpy as np

from trsr_dist.planning.restarts import Restarts
from trsr_dist.shards.packing import deal
from trsr_dist.shards.plan import WindowPlan


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
