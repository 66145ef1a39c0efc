"""Files that hold one array of numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trsr_dist.files import plain

SMALL_BYTES = 1 << 19
KEPT_BYTES = 1 << 30
"""Of all files of a kind: the indexes of 40 million samples, the lengths of 10 million users with 21 candidates."""
MAPPED_FILES = 256
"""So many mapped files of a kind are kept open."""


def open_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file's values, read-only; a small file is read, since a mapping would hold one of the process's few files.

    Raises:
        FileNotFoundError: it is missing.
        DataError: it is no plain file.
        ValueError: it is empty, or its size is not that of whole values.
    """
    if path.stat().st_size > SMALL_BYTES:
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    with open(path, "rb", opener=plain) as stream:
        content = stream.read()
    if not content:
        raise ValueError("empty")
    return np.frombuffer(content, dtype=dtype)


class KeptArrays:
    """Arrays of numbered files, each opened once; above ``KEPT_BYTES`` the least recently used make room.

    A window of an epoch looks into hundreds of shards at random: what is not kept is opened again for each window.

    Args:
        open_one: from a number to its array.
    """

    def __init__(self, open_one: Callable[[int], np.ndarray]) -> None:
        self._open_one = open_one
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __call__(self, number: int) -> np.ndarray:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        array = self._kept[number] = self._open_one(number)
        self._bytes += _cost(array)
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= _cost(self._kept.popitem(last=False)[1])
        return array


def _cost(array: np.ndarray) -> int:
    return array.nbytes if array.nbytes <= SMALL_BYTES else KEPT_BYTES // MAPPED_FILES
