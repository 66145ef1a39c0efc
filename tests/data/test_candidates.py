"""Pools of categories in bounded memory, and the guards of the store."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.data.raw import make_config, write_mind
from trsr_dist.data.candidates import category_pools
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import ROWS_PER_BATCH, USER_SCHEMA, ArrowRows, ArrowWriter, HistoryStore
from trsr_dist.errors import DataError, RunError


def test_one_long_category_costs_no_more_than_itself() -> None:
    tracemalloc.start()
    pools = category_pools(["a" * 40_000, *["b", "c"] * 2000], np.ones(4001))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pools) == 3 and peak < 40_000 * 100


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
