"""Single interactions, a row each, to users' clicks in their order: columns of numbers, about 24 bytes an interaction.

JSON lines and Parquet are read a block at a time. A block in which anything is not as usual is read again row by row:
then the row that is wrong is named, or what is merely unusual is understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json

from trsr_dist.data.ragged import Ragged
from trsr_dist.data.source import Counts
from trsr_dist.data.times import all_seconds, unix_seconds

BLOCK_BYTES = 1 << 25
BLOCK_ROWS = 1 << 17
MOST_PARTS = 16
"""Whose dictionaries of ids are kept apart."""
UNUSUAL_ID = r"^[^!-~]|[^!-~]$|^$"
"""May have blanks at its ends, or nothing between them."""
FIRST_SECOND, LAST_SECOND = -62_135_596_800, 10**11
"""Python's first date, and the last number that ``unix_seconds`` takes for seconds."""
PARTS_OF_A_SECOND = 1e6


class Interactions:
    """Who met what and when, in the file's order."""

    def __init__(self) -> None:
        self._ids: tuple[list[pa.DictionaryArray], list[pa.DictionaryArray]] = [], []
        self._times: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def add_rows(self, rows: Iterable[tuple[str, str, float, int]]) -> None:
        """User, item, Unix seconds and row in the file of each."""
        rows = iter(rows)
        while block := list(islice(rows, BLOCK_ROWS)):
            users, items, times, places = zip(*block, strict=True)
            ids = [pa.array(names, pa.large_string()).dictionary_encode() for names in (users, items)]
            self._add(ids, np.array(times, np.float64), np.array(places, np.int64))

    def add_columns(self, columns: pa.Table, row: int, time_format: str, counts: Counts) -> bool:
        """A block of them; False, and nothing is added, where one needs a look at its row.

        Args:
            columns: user, item and time.
            row: of the first.
            time_format: ``data.time_format``.
            counts: how many times were not in seconds.
        """
        if not len(columns):
            return True
        try:
            users, items, times = (column.combine_chunks() for column in columns.columns)
            ids = [_encoded(users), _encoded(items)]
            self._add(ids, _seconds(times, time_format, counts), np.arange(row, row + len(columns)))
        except (ValueError, TypeError, OverflowError, pa.ArrowException):
            return False
        return True

    def _add(self, ids: list[pa.DictionaryArray], times: np.ndarray, rows: np.ndarray) -> None:
        for parts, part in zip(self._ids, ids, strict=True):
            parts.append(part)
            if len(parts) > MOST_PARTS:
                parts[:] = [pa.concat_arrays(parts)]
        self._times.append(times)
        self._rows.append(rows)

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def table(self, codes_of: Callable[[pa.Array], np.ndarray]) -> pa.Table:
        """A row a user, in the order in which they are met first: items, times and rows in the file's order.

        Args:
            codes_of: from ids to numbers of items.
        """
        (users, names), (items, ids) = (_codes(parts) for parts in self._ids)
        order, lengths = np.argsort(users, kind="stable"), np.bincount(users, minlength=len(names))
        values = {"items": codes_of(ids)[items], "times": _joined(self._times), "rows": _joined(self._rows)}
        lists = {name: Ragged.of(column[order], lengths).arrow() for name, column in values.items()}
        return pa.table({"user": names.cast(pa.string()), **lists})


def joined_clicks(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, rows: np.ndarray, counts: Counts
) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """Interactions of all users, in the file's order for each of them.

    Args:
        users: int32 [interactions], codes from 0, all of which occur.
        items: int32 [interactions].
        times: float64 [interactions], seconds.
        rows: int64 [interactions], in the file.
        counts: how many interactions repeat an earlier one, and do not count.

    Returns:
        The items of each user by time; int64 [users], places of the latest interactions; int64 [users], the rows in
        which the users are met first.
    """
    order = np.lexsort((times, users))
    ends = np.cumsum(np.bincount(users[order]))
    firsts = np.minimum.reduceat(rows[order], np.append(0, ends[:-1]))
    repeats = repeated_rows(order, users, times, items)
    counts["repeated_interactions"] += len(repeats)
    if len(repeats):
        order = order[~np.isin(order, repeats)]
        ends = np.cumsum(np.bincount(users[order]))
    return Ragged(items[order], np.append(0, ends)), order[ends - 1], firsts


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate(parts)
    parts.clear()
    return joined


def _codes(parts: list[pa.DictionaryArray]) -> tuple[np.ndarray, pa.Array]:
    """int32 [interactions], places in the ids, which stand in the order in which they are met first."""
    joined = pa.concat_arrays(parts)
    parts.clear()
    return joined.indices.to_numpy(), joined.dictionary


def _encoded(column: pa.Array) -> pa.DictionaryArray:
    """Ids as ``as_id`` gives them, each once.

    Raises:
        ValueError: one is no id.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if column.null_count or not (pa.types.is_integer(kind) or _is_text(kind)):
        raise ValueError
    found = column.dictionary_encode()
    ids = found.dictionary.cast(pa.large_string())
    if pc.any(pc.match_substring_regex(ids, UNUSUAL_ID)).as_py():
        ids = pa.array([as_id(value) for value in ids.to_pylist()], pa.large_string())
        clean = ids.dictionary_encode()  # two may be one without their blanks
        return pa.DictionaryArray.from_arrays(clean.indices.take(found.indices), clean.dictionary)
    return pa.DictionaryArray.from_arrays(found.indices, ids)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def as_id(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    """An id: text or an integer, without blanks around it.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str | int) and not isinstance(value, bool) and (text := str(value).strip()):
        return text
    raise ValueError


def _seconds(column: pa.Array, time_format: str, counts: Counts) -> np.ndarray:
    """Unix seconds, float64 [interactions].

    Raises:
        TypeError, ValueError, OverflowError: one is no time; nothing was counted.
    """
    kind = column.type
    if column.null_count:
        raise ValueError
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        values = column.cast(pa.timestamp("us")).cast(pa.int64()).to_numpy() / PARTS_OF_A_SECOND
        if not ((values >= FIRST_SECOND) & (values < LAST_SECOND)).all():
            raise ValueError
    elif pa.types.is_floating(kind):
        values = column.cast(pa.float64()).to_numpy()
    elif pa.types.is_integer(kind):
        values = column.cast(pa.int64()).to_numpy()
    elif _is_text(kind):
        found = Counts()
        values = np.array([unix_seconds(text, time_format, found) for text in column.to_pylist()])
        counts.update(found)
        return values
    else:
        raise ValueError
    return all_seconds(values, counts)


def json_columns(block: bytes, names: tuple[str, ...], first: Mapping[str, Any]) -> pa.Table | None:
    """User, item and time of a block of JSON lines; None where it must be read line by line.

    Args:
        block: whole lines.
        names: of the three fields.
        first: a record; the others' fields are taken to be of the same types.
    """
    fields = [(name, _json_type(first.get(name))) for name in names]
    # A line end between a brace that closes and one that opens stands between two records, and they have no other.
    num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
    num_records = block.startswith(b"{") + block.count(b"}\n{") + block.count(b"}\r\n{")
    if num_lines != num_records or len({*names}) < len(names) or any(kind is None for _, kind in fields):
        return None
    read = arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    parse = arrow_json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    with suppress(UnicodeDecodeError, pa.ArrowException):
        block.decode()
        found = arrow_json.read_json(pa.BufferReader(block), read, parse)
        return found.select(names) if found.num_rows == num_lines else None
    return None


def _json_type(value: Any) -> pa.DataType | None:  # noqa: ANN401 (any JSON value)
    return {str: pa.string(), int: pa.int64(), float: pa.float64()}.get(type(value))


def repeated_rows(order: np.ndarray, users: np.ndarray, times: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Interactions that say again what an earlier row has said: same user, item and time.

    Args:
        order: int64 [interactions], sorted by user, then time, then row.
        users: int32 [interactions], codes.
        times: float64 [interactions], seconds.
        items: int32 [interactions], codes.

    Returns:
        int64, indices of the later rows of each set of equal ones.
    """
    before = np.flatnonzero(_equals_next(order, users, times))
    tied = order[np.union1d(before, before + 1)]
    tied = tied[np.lexsort((tied, items[tied], times[tied], users[tied]))]
    return tied[1:][_equals_next(tied, users, times, items)]


def _equals_next(rows: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """bool [rows - 1]: whether a row has the values of the next one; a column at a time, to save memory."""
    is_equal = np.ones(max(0, len(rows) - 1), bool)
    for column in columns:
        values = column[rows]
        is_equal &= values[1:] == values[:-1]
    return is_equal
