"""Tables cut into parts by user: a file holds a batch for each part, so that one part is read from many files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from trsr_dist.hashing import hash64_bytes

STRIDE = np.uint64(0x100000001B3)
MIX = np.uint64(0x9E3779B97F4A7C15)
HALF = np.uint64(32)


def write_parts(path: Path, table: pa.Table, part_of: np.ndarray, num_parts: int) -> None:
    """Write the rows of each part, in their order, as one batch.

    Args:
        path: takes an Arrow file.
        table: of any columns.
        part_of: int64 [rows].
        num_parts: parts have numbers below it.
    """
    ends = np.cumsum(np.bincount(part_of, minlength=num_parts))
    table = table.take(pa.array(np.argsort(part_of, kind="stable"))).combine_chunks()
    with pa.ipc.new_file(str(path), table.schema) as writer:
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            part = table.slice(start, end - start).to_batches()
            writer.write_batch(part[0] if part else pa.RecordBatch.from_pylist([], table.schema))


def read_part(paths: Iterable[Path], part: int) -> list[pa.RecordBatch]:
    """One part of all files, memory-mapped."""
    return [pa.ipc.open_file(pa.memory_map(str(path))).get_batch(part) for path in paths]


def read_columns(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Some columns of numbers of all parts, one part after the other."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return [table[name].to_numpy() for name in names]


def part_of_name(names: pa.Array, num_parts: int) -> np.ndarray:
    """Which part a name belongs to, int64 [names]: by a polynomial of its bytes, computed for all names at once."""
    if num_parts == 1:
        return np.zeros(len(names), np.int64)
    names = names.cast(pa.large_string())
    ends = np.frombuffer(names.buffers()[1], np.int64)[names.offset : names.offset + len(names) + 1]
    values = np.frombuffer(names.buffers()[2], np.uint8)[ends[0] : ends[-1]].astype(np.uint64) + np.uint64(1)
    starts, lengths = ends[:-1] - ends[0], np.diff(ends)
    powers = np.cumprod(np.full(lengths.max(), STRIDE))
    values *= powers[np.arange(len(values)) - np.repeat(starts, lengths)]
    found = np.add.reduceat(values, starts)
    found = (found ^ (found >> HALF)) * MIX
    return hash_range(found ^ (found >> HALF), num_parts)


def hash64_many(names: Iterable[str], *, before: Sequence[object] = (), after: Sequence[object] = ()) -> np.ndarray:
    """``hash64`` of many names, with other keys before and after each: uint64 [names]."""
    return np.frombuffer(hash64_bytes(names, before=before, after=after), ">u8").astype(np.uint64)


def hash_range(hashes: np.ndarray, num_parts: int) -> np.ndarray:
    """Which of ``num_parts`` ranges of equal size a hash (uint64) lies in, int64."""
    return ((hashes >> HALF) * np.uint64(num_parts) >> HALF).astype(np.int64)
