"""Order and packing: permutations at every size, constant memory, full rows, fair shares."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from trsr_dist.hashing import random_stream
from trsr_dist.shards.order import Order, mix, permute
from trsr_dist.shards.packing import choose_candidates, deal, pack


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 1025])
def test_permute_is_a_permutation(size: int) -> None:
    assert sorted(permute(np.arange(size), size, 0, "key").tolist()) == list(range(size))


def test_permute_looks_random() -> None:
    size = 4096
    first, second = (permute(np.arange(size), size, seed, "key") for seed in (0, 1))
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.05
    assert np.mean(first == second) < 0.01


@pytest.mark.parametrize("num_samples", [1, 5, 31, 32, 33, 1000, 10_000])
def test_every_sample_once_an_epoch(num_samples: int) -> None:
    order = Order(num_samples, window_blocks=4, seed=9)
    seen = [range(*run) for epoch in (0,) for window in range(order.num_windows) for run in order.runs(epoch, window)]
    assert sorted(sample for run in seen for sample in run) == list(range(num_samples))


def test_order_differs_between_epochs_and_seeds() -> None:
    runs = [Order(10_000, 4, seed).runs(epoch, 2) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert runs[0] != runs[1] and runs[0] != runs[2]
    assert runs[0] == Order(10_000, 4, 0).runs(0, 2)


def test_order_of_a_hundred_million_samples_needs_little_memory() -> None:
    tracemalloc.start()
    order = Order(10**8, 256, 0)
    runs = order.runs(3, order.num_windows * 9 // 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(runs) == 256 and all(0 <= start < stop <= 10**8 for start, stop in runs)
    assert peak < 1_000_000


@pytest.mark.parametrize("longest_share", [4, 6, 10])
def test_rows_are_full(longest_share: int) -> None:
    random = random_stream("lengths", longest_share)
    capacity = 4096
    tokens = np.array([random.randint(100, capacity // longest_share) for _ in range(4000)])
    rows = pack(tokens, capacity, mix(np.arange(4000, dtype=np.uint64)))
    assert sorted(unit for row in rows for unit in row) == list(range(4000))
    assert max(tokens[row].sum() for row in rows) <= capacity
    assert tokens.sum() / (len(rows) * capacity) >= 0.97


def test_rows_of_like_units_are_full() -> None:
    """Between eight and nine units a row: best fit alone reaches 0.96."""
    draw = np.random.default_rng(0)
    tokens = np.clip(draw.normal(458, 25, 4000), 350, 560).astype(np.int64)
    rows = pack(tokens, 4049, mix(np.arange(4000, dtype=np.uint64)))
    assert sorted(unit for row in rows for unit in row) == list(range(4000))
    assert max(tokens[row].sum() for row in rows) <= 4049
    assert tokens.sum() / (len(rows) * 4049) >= 0.97


@pytest.mark.parametrize("capacity", [1, 7, 20, 100])
def test_every_unit_finds_a_row(capacity: int) -> None:
    draw = np.random.default_rng(capacity)
    for count in (0, 1, 2, 50):
        tokens = draw.integers(1, capacity + 1, count)
        rows = pack(tokens, capacity, mix(np.arange(count, dtype=np.uint64)))
        assert sorted(unit for row in rows for unit in row) == list(range(count))
        assert all(tokens[row].sum() <= capacity for row in rows)


def test_long_units_are_packed_as_well_as_by_first_fit_decreasing() -> None:
    random = random_stream("long")
    tokens = np.array([random.randint(300, 1000) for _ in range(2000)])
    rows = pack(tokens, 1000, mix(np.arange(2000, dtype=np.uint64)))
    assert len(rows) <= first_fit_decreasing(tokens.tolist(), 1000)


def first_fit_decreasing(tokens: list[int], capacity: int) -> int:
    spaces: list[int] = []
    for size in sorted(tokens, reverse=True):
        for number, space in enumerate(spaces):
            if space >= size:
                spaces[number] -= size
                break
        else:
            spaces.append(capacity - size)
    return len(spaces)


def test_every_negative_is_drawn_equally_often() -> None:
    labels = np.arange(11) == 3
    draws = sum(
        choose_candidates(np.array([99], np.uint64), np.array([0, 11]), labels, 2, seed).astype(int)
        for seed in range(4000)
    )
    assert draws[3] == 4000
    assert np.abs(np.delete(draws, 3) - 800).max() < 5 * np.sqrt(800)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_get_equal_counts_and_costs(world_size: int) -> None:
    random = random_stream("costs")
    costs = [random.uniform(1, 2) for _ in range(24)]
    hands = deal(costs, world_size)
    assert sorted(row for hand in hands for row in hand) == list(range(24))
    assert {len(hand) for hand in hands} == {24 // world_size}
    sums = [sum(costs[row] for row in hand) for hand in hands]
    assert max(sums) - min(sums) < 0.25
    for place in range(24 // world_size):
        together = [costs[hand[place]] for hand in hands]
        assert max(together) - min(together) < 0.6
