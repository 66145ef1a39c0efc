"""The simulated data plane against the stream itself and against closed formulas, up to 1,024 ranks."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data_plane import EpochRows, divide, epoch_rows, mix_windows, run_with_failures
from benchmarks.mixes import MIND
from tests.shards.world import make_builder, make_split
from trsr_dist.hashing import random_stream
from trsr_dist.planner.cost import Restarts, best_interval
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.plan import PackingSettings, TrainPlan, step_specs
from trsr_dist.shards.steps import StreamState

RESTART = 300.0
SETTINGS = PackingSettings(row_tokens=1000, rows_per_step=6, negatives_per_positive=2, seed=0)


def test_simulated_ranks_get_the_streams_rows(tmp_path: Path) -> None:
    shards, builder = make_split(tmp_path / "train"), make_builder()
    plan = TrainPlan(measure_lengths(shards, builder), SETTINGS)
    rows = epoch_rows(plan.windows(0), plan.head)
    facts = plan.facts(0)
    assert rows.tokens.sum() == facts.num_tokens
    loads = divide(rows, SETTINGS.rows_per_step, 4)
    assert loads.tokens.shape == (facts.num_steps, 4)
    start = StreamState(0, 0, 0, 0, "", "", "", **asdict(SETTINGS))
    for rank in range(4):
        for number, spec in enumerate(islice(step_specs(plan, start, rank, 4), facts.num_steps)):
            units = [(unit.prefix - plan.head + sum(unit.suffixes)) for row in spec.rows for unit in row]
            heads = plan.head * sum(bool(row) for row in spec.rows)
            assert loads.tokens[number, rank] == sum(units) + heads


@pytest.mark.parametrize("world_size", [1, 64, 1024])
def test_many_ranks_get_even_shares(world_size: int) -> None:
    """Two whole steps of real users' lengths; every row is dealt once."""
    rows = epoch_rows(mix_windows(MIND, 40_000, num_candidates=2, row_tokens=4096), MIND.head)
    whole = len(rows.costs) // 2048 * 2048
    assert whole >= 4096
    rows = EpochRows(rows.costs[:whole], rows.tokens[:whole])
    loads = divide(rows, 2048, world_size)
    assert loads.tokens.sum() == rows.tokens.sum()
    assert loads.costs.sum() == pytest.approx(rows.costs.sum())
    assert loads.slowest < 1.02
    assert loads.most_tokens < 1.02
    if world_size > 1:
        assert loads.straggling(0.05, seed=0) > loads.slowest


def test_stragglers_cost_what_the_largest_of_many_draws_is() -> None:
    """Even rows, normal times: the expected largest of 1,024 standard normals is 3.2."""
    loads = divide(EpochRows(np.ones(20_480), np.ones(20_480, dtype=int)), 1024, 1024)
    assert loads.slowest == 1
    assert loads.straggling(0.05, seed=0) == pytest.approx(1 + 0.05 * 3.2, abs=0.01)


@pytest.mark.parametrize("ranks", [8, 1024])
def test_failures_cost_what_the_formula_says(ranks: int) -> None:
    failing = 4e6 / ranks
    plan = Restarts(save=5, interval=best_interval(5, failing), restart=300, between_failures=failing)
    work = 20_000 * plan.interval
    found = run_with_failures(work, plan, random_stream("failures", ranks)) / work - 1
    assert found == pytest.approx(plan.overhead, rel=0.1)
    for factor in (0.2, 5):
        other = Restarts(5, factor * plan.interval, 300, failing)
        assert other.overhead > plan.overhead


def test_restarts_agree_with_failures_at_random() -> None:
    """A segment is done where no failure comes within it; a restart where none comes within that."""
    mean, stream = 2000.0, np.random.default_rng(0)

    def seconds_until_done(length: float, count: int) -> np.ndarray:
        spent, open_ones = np.zeros(count), np.arange(count)
        while len(open_ones):
            failure = stream.exponential(mean, len(open_ones))
            failed = failure < length
            spent[open_ones] += np.minimum(failure, length)
            open_ones = open_ones[failed]
            if length > RESTART and len(open_ones):
                spent[open_ones] += seconds_until_done(RESTART, len(open_ones))
        return spent

    found = Restarts(save=50, interval=600, restart=RESTART, between_failures=mean).overhead
    simulated = seconds_until_done(650, 200_000).mean() / 600 - 1
    assert found == pytest.approx(simulated, abs=0.01)
    assert Restarts(50, 600, RESTART, 1e12).overhead == pytest.approx(50 / 600, rel=1e-6)
    assert best_interval(50, 10_000) == 1000
