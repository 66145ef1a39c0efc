"""Order, draws and packing against plain restatements: a checkpoint goes on where another run stopped, so none of these
rules may change unnoticed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from trsr_dist.hashing import hash64, random_stream
from trsr_dist.shards.order import Order, mix, permute
from trsr_dist.shards.packing import (
    _best_fit,
    _best_sums,
    attended_pairs,
    choose_candidates,
    deal,
    pack,
    row_cost,
    split_unit,
)

BITS = (1 << 64) - 1


def plain_mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & BITS
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & BITS
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & BITS
    return value ^ (value >> 31)


def plain_permute(position: int, size: int, *key: object) -> int:
    half = 1
    while 4**half < size:
        half += 1
    value = position
    while True:
        left, right = value >> half, value % 2**half
        for number in range(4):
            left, right = right, left ^ plain_mix(right ^ hash64(*key, number)) % 2**half
        value = left << half | right
        if value < size:
            return value


def test_mix_gives_the_published_outputs_of_splitmix64() -> None:
    """Of the generator that starts at 0: its state grows by the golden ratio."""
    states = np.array([0, 0x9E3779B97F4A7C15, 2 * 0x9E3779B97F4A7C15 & BITS], dtype=np.uint64)
    assert mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 16, 17, 64, 65, 300])
def test_permutations_by_a_plain_network(size: int) -> None:
    found = permute(np.arange(size), size, 7, "key")
    assert found.tolist() == [plain_permute(position, size, 7, "key") for position in range(size)]
    assert found.dtype == np.int64


@pytest.mark.parametrize("num_samples", [5, 32, 96, 1000, 1024])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epochs_order_by_a_plain_restatement(num_samples: int, epoch: int) -> None:
    order, full = Order(num_samples, window_blocks=3, seed=9), num_samples // 32
    blocks = [plain_permute(place, full, 9, epoch, "blocks") for place in range(full)]
    turn = hash64(9, epoch, "turn")
    starts = [(32 * block, 32) for block in blocks] + [(32 * full, num_samples % 32)]
    expected = [(start + turn + place) % num_samples for start, size in starts for place in range(size)]
    windows = [order.runs(epoch, window) for window in range(order.num_windows)]
    assert [sample for runs in windows for run in runs for sample in range(*run)] == expected
    sizes = [sum(stop - start for start, stop in runs) for runs in windows]
    assert len(windows) == -(-num_samples // 96) and sizes[:-1] == [96] * (len(windows) - 1)
    assert all(start < stop for runs in windows for start, stop in runs)


def test_the_blocks_borders_move_with_the_epoch() -> None:
    order = Order(4096, 16, seed=0)
    borders = [{start % 32 for start, _ in order.runs(epoch, 1) if start} for epoch in range(6)]
    assert all(len(places) == 1 for places in borders)
    assert len(set.union(*borders)) > 1


def test_a_run_that_ends_with_the_set_is_one() -> None:
    runs = [Order(5, 1, seed).runs(0, 0) for seed in range(20)]
    assert [(0, 5)] in runs
    assert all(start < stop for found in runs for start, stop in found)


def plain_draw(key: int, labels: Sequence[bool], negatives: int, seed: int) -> list[bool]:
    """One user's candidates: the positives, and the negatives of the lowest hash."""
    base = plain_mix(key ^ seed)
    ranks = [(plain_mix((base + number) & BITS) >> 24, number) for number, label in enumerate(labels) if not label]
    wanted = negatives * max(1, sum(labels))
    drawn = {number for _, number in sorted(ranks)[:wanted]}
    return [bool(label) or number in drawn for number, label in enumerate(labels)]


def test_draws_by_a_plain_restatement() -> None:
    users = [
        [0, 1, 0, 0, 0, 0, 0],
        [1],
        [1, 0, 1, 0, 0, 0, 0, 0, 0],
        [0] * 6,
        [0],
        [0, 0, 1, 1],
        [0] * 9 + [1],
        [0] * 4,
    ]
    labels = np.array([label for user in users for label in user], dtype=bool)
    starts = np.concatenate([[0], np.cumsum([len(user) for user in users])])
    keys = mix(np.arange(len(users), dtype=np.uint64))
    for seed, negatives in ((0, 1), (2**63 + 5, 2), (77, 4)):
        found = choose_candidates(keys, starts, labels, negatives, seed)
        plain = [plain_draw(int(key), user, negatives, seed) for key, user in zip(keys, users, strict=True)]
        assert found.dtype == bool
        assert found.tolist() == [chosen for user in plain for chosen in user]


def test_pairs_are_those_of_causal_attention() -> None:
    units = [(5, [2, 3]), (4, [1]), (0, [6, 2])]
    expected = [
        sum(range(1, prefix + 1)) + sum(prefix + place + 1 for size in suffixes for place in range(size))
        for prefix, suffixes in units
    ]
    prefixes, sums = np.array([prefix for prefix, _ in units]), np.array([sum(suffixes) for _, suffixes in units])
    squares = np.array([sum(size**2 for size in suffixes) for _, suffixes in units])
    found = attended_pairs(prefixes, sums, squares)
    assert (found.tolist(), found.dtype) == (expected, np.int64)


def test_an_attended_pair_costs_its_share_of_a_token() -> None:
    assert row_cost(np.array(100), np.array(3 * 24576)) == 103
    assert row_cost(np.array(100), np.array(24576 // 2)) == 100.5


def plain_best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Of equally full rows the one that was filled last."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []
    for unit, size in enumerate(sizes):
        fitting = [(space, -turn, row) for row, (space, turn) in enumerate(spaces) if space >= size]
        if fitting:
            space, _, row = min(fitting)
        else:
            space, row = capacity, len(rows)
            rows.append([])
            spaces.append((0, 0))
        rows[row].append(unit)
        spaces[row] = space - size, unit
    return rows


def plain_best_sums(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    left, rows = list(range(len(sizes))), []
    while left:
        first, left = left[0], left[1:]
        space, step = capacity - sizes[first], max(1, len(left) // 32)
        sums: dict[int, tuple[int, ...]] = {0: ()}
        for unit in left[::step]:
            for total, units in list(sums.items()):
                if total + sizes[unit] <= space:
                    sums.setdefault(total + sizes[unit], (unit, *units))
        chosen = sums[max(sums)]
        rows.append([first, *chosen])
        left = [unit for unit in left if unit not in chosen]
    return rows


@pytest.mark.parametrize(("count", "capacity"), [(1, 1), (6, 20), (40, 30), (40, 97), (150, 60), (150, 2000)])
def test_rows_by_plain_restatements(count: int, capacity: int) -> None:
    random = random_stream("rows", count, capacity)
    sizes = sorted((random.randint(1, capacity // random.randint(1, 3)) for _ in range(count)), reverse=True)
    assert _best_fit(sizes, capacity) == plain_best_fit(sizes, capacity)
    assert _best_sums(sizes, capacity) == plain_best_sums(sizes, capacity)


def test_best_fit_gives_way_where_it_leaves_room() -> None:
    ties = np.arange(6, dtype=np.uint64)
    assert pack(np.array([7, 6, 5, 4, 2]), 12, ties[:5]) == [[0, 2], [1, 3, 4]], "all full: as best fit put them"
    sizes = np.array([4, 4, 3, 3, 3, 3])
    assert len(_best_fit(sizes.tolist(), 10)) == 3
    assert pack(sizes, 10, ties) == [[0, 3, 2], [1, 5, 4]], "4 + 3 + 3 twice"
    assert pack(np.array([6, 6]), 10, ties[:2]) == [[0], [1]]


def test_rows_that_are_full_are_not_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("trsr_dist.shards.packing._best_sums")
    assert pack(np.array([99]), 100, np.zeros(1, np.uint64)) == [[0]]
    with pytest.raises(NameError):
        pack(np.array([98]), 100, np.zeros(1, np.uint64))


def test_units_of_equal_length_are_ordered_by_their_ties() -> None:
    assert pack(np.array([2, 5, 2, 5]), 5, np.array([3, 2, 1, 0], np.uint64)) == [[3], [1], [2, 0]]


def test_chunks_by_hand() -> None:
    assert split_unit(40, [30, 50, 20, 60, 10, 10], 120) == [(0, 2), (2, 4), (4, 6)]
    assert split_unit(40, [30, 50], 120) == [(0, 2)]
    assert split_unit(100, [30, 10, 10, 30], 120) == [(0, 1), (1, 3), (3, 4)], "what is too long stands alone"


def test_rows_are_dealt_by_hand() -> None:
    assert deal([5, 4, 3, 2, 1], 2) == [[0, 3, 4], [1, 2]]
    assert deal([1, 2, 3, 4, 5], 2) == [[4, 1, 0], [3, 2]]
    assert deal([1, 1, 1], 2) == [[0, 2], [1]], "equal costs in the order of rows and ranks"
    assert deal([9, 5, 4, 3, 3, 1], 2) == [[0, 3, 5], [1, 2, 4]], "the sums count, not the last rows"
    assert deal([2.0], 3) == [[0], [], []]
