"""Draws of negatives: weights, exclusions, times, and the store's guards."""

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.raw import make_config, write_mind
from trsr_dist.data.candidates import ItemPool, category_pools, draw_negatives, split_by_user
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import ROWS_PER_BATCH, USER_SCHEMA, ArrowRows, ArrowWriter, HistoryStore
from trsr_dist.errors import DataError, RunError
from trsr_dist.hashing import random_stream


def test_draws_follow_the_weights() -> None:
    pool = ItemPool(np.arange(4), np.array([1, 2, 0, 5]))
    drawn = Counter(pool.draw(1, set(), random_stream("w", i))[0] for i in range(4000))
    assert drawn[2] == 0
    for row, share in ((0, 1 / 8), (1, 2 / 8), (3, 5 / 8)):
        assert drawn[row] / 4000 == pytest.approx(share, abs=0.03)


def test_the_whole_pool_is_found_when_almost_all_is_wanted() -> None:
    weights = np.array([10**6] + [1] * 999)
    pool = ItemPool(np.arange(1000), weights)
    assert len(set(pool.draw(998, {7}, random_stream("a"))) - {7}) == 998
    drawn = pool.draw(2000, {7}, random_stream("a"))
    assert sorted(drawn) == [i for i in range(1000) if i != 7]


def test_only_items_seen_before() -> None:
    pool = ItemPool(np.arange(6), np.ones(6), first_seen=np.array([50, 10, 40, 20, 30, 60]))
    assert sorted(pool.draw(6, set(), random_stream("t"), before=40)) == [1, 3, 4]
    assert pool.draw(6, set(), random_stream("t"), before=10) == []


def test_negatives_are_dealt_over_targets_and_never_repeat() -> None:
    pools = category_pools(["a", "b"] * 20 + [""], np.ones(41))
    assert set(pools) == {"a", "b"}
    names = ["a", "b"] * 20
    drawn = draw_negatives(lambda target: pools[names[target]], [0, 1], {2, 3}, 11, random_stream("d"))
    assert len(set(drawn)) == 11
    assert not set(drawn) & {0, 1, 2, 3}
    assert Counter(names[row] for row in drawn) == {"a": 5, "b": 6}


def test_one_long_category_costs_no_more_than_itself() -> None:
    tracemalloc.start()
    pools = category_pools(["a" * 40_000, *["b", "c"] * 2000], np.ones(4001))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pools) == 3 and peak < 40_000 * 100


def test_users_are_split_ten_to_one_to_one() -> None:
    sizes = Counter(split_by_user([f"user {i}" for i in range(12000)], (10, 1, 1)).tolist())
    assert [sizes[i] / 1000 for i in range(3)] == pytest.approx([10, 1, 1], abs=0.15)


def test_rows_beyond_one_batch(tmp_path: Path) -> None:
    rows = ROWS_PER_BATCH * 2 + 3
    with ArrowWriter(tmp_path / "x.arrow", USER_SCHEMA) as writer:
        for i in range(rows):
            writer.add(f"u{i}", [i, i + 1], [i], [1], i)
    read = ArrowRows(tmp_path / "x.arrow")
    assert len(read) == rows
    for i in (0, ROWS_PER_BATCH - 1, ROWS_PER_BATCH, rows - 1):
        assert [read.value(column, i) for column in range(5)] == [f"u{i}", [i, i + 1], [i], [1], i]
    with pytest.raises(IndexError):
        read.value(0, rows)


def test_a_store_that_is_damaged_or_unfinished(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run the stage"):
        HistoryStore(tmp_path)
    write_mind(tmp_path)
    prepare(make_config(tmp_path, "mind"))
    folder = tmp_path / "run" / "histories"
    path = folder / "train.arrow"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train\.arrow: not a complete Arrow file"):
        HistoryStore(folder, check=False)
    path.unlink()
    with pytest.raises(DataError, match=r"train\.arrow"):
        HistoryStore(folder)
