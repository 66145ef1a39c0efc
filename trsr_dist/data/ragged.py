"""Lists of different lengths in two arrays, so that numpy works on thousands of users at once. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of integers, one after the other."""

    values: np.ndarray
    """int32 or int8, of all lists."""
    ends: np.ndarray
    """int64, shape (num_lists + 1,): list i is ``values[ends[i] : ends[i + 1]]``."""

    @classmethod
    def of(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        """From the lists' lengths."""
        return cls(values, np.append(0, np.cumsum(lengths, dtype=np.int64)))

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """From Python's."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        return cls.of(np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum())), lengths)

    @classmethod
    def from_arrow(cls, columns: Sequence[pa.ListArray]) -> Ragged:
        """From the batches of a column."""
        lengths = [column.value_lengths().to_numpy() for column in columns]
        return cls.of(np.concatenate([column.flatten().to_numpy() for column in columns]), np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64, shape (num_lists,)."""
        return np.diff(self.ends)

    @property
    def owners(self) -> np.ndarray:
        """Of each value the list that it stands in, int64."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def joined(self, other: Ragged) -> Ragged:
        """These lists, then the others."""
        values = np.append(self.values, other.values)
        return Ragged.of(values.astype(self.values.dtype), np.append(self.lengths, other.lengths))

    def list(self, place: int) -> list[int]:
        """One list."""
        return self.values[self.ends[place] : self.ends[place + 1]].tolist()

    def parted(self) -> tuple[Ragged, Ragged]:
        """Each list, none of which is empty, without its last value, and that value."""
        is_last = np.zeros(len(self.values), bool)
        is_last[self.ends[1:] - 1] = True
        ones = np.ones(len(self), np.int64)
        return Ragged.of(self.values[~is_last], self.lengths - 1), Ragged.of(self.values[is_last], ones)

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists of some rows (int64)."""
        return self._gathered(self.ends[rows], self.lengths[rows])

    def first(self, lengths: np.ndarray) -> Ragged:
        """The first values of each list: as many as int64 [lists] says, which is no more than there are."""
        return self._gathered(self.ends[:-1], lengths)

    def latest(self, most: int) -> Ragged:
        """The last ``most`` values of each list; 0: all."""
        if not most:
            return self
        lengths = np.minimum(self.lengths, most)
        return self._gathered(self.ends[1:] - lengths, lengths)

    def arrow(self) -> pa.ListArray:
        return pa.ListArray.from_arrays(self.ends.astype(np.int32), self.values)

    def _gathered(self, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
        before = np.cumsum(lengths) - lengths
        places = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
        return Ragged.of(self.values[places], lengths)
