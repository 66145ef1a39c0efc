"""The data plane on up to 1,024 ranks, simulated with the stream's own packing and dealing: evenness, stragglers,
restarts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.common import Row
from benchmarks.mixes import AMAZON, MIND, Mix
from trsr_dist.forecast.simulation import Loads, divide, epoch_rows, run_with_failures
from trsr_dist.hashing import random_stream
from trsr_dist.planning.restarts import Restarts, best_interval
from trsr_dist.shards.lengths import Table
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
DAY = 86400.0


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
