"""Users' logs in tables: as a part of the log gives them, and of all parts together each user once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa

from trsr_dist.data.interactions import Interactions, joined_clicks
from trsr_dist.data.items import UNKNOWN
from trsr_dist.data.ragged import Ragged
from trsr_dist.data.source import Counts
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.records import UserLog

LOGS_AT_ONCE = 1 << 14
LISTS = ("history", "targets", "shown")
BITS_OF_A_ROW = 40
"""In a log's place among all: the number of its unit, and its row."""
LAST = (1 << BITS_OF_A_ROW) - 1
NEVER = np.iinfo(np.int64).max
AFTER_ALL = 1 << 62
"""Places of what is found wrong when all rows have been read."""


class ItemCodes:
    """From item ids to rows of the catalogue.

    What has no row has a separate negative number: an odd one where the catalogue left it out, an even one where it
    is unknown.
    """

    def __init__(self, rows: Mapping[str, int], keep_unknown: bool) -> None:
        self._rows = rows
        self._keep_unknown = keep_unknown
        self.unknown: dict[int, str] = {}
        """Ids of unknown items, if they are kept."""

    def of(self, ids: pa.Array) -> np.ndarray:
        """int32 [ids]."""
        texts = ids.to_pylist()
        found = np.array([self._rows.get(text, UNKNOWN) for text in texts], np.int32)
        for place in np.flatnonzero(found < 0).tolist():
            found[place] -= 2 * (hash64(texts[place]) >> 35)
            if self._keep_unknown and found[place] % 2 == 0:
                self.unknown[int(found[place])] = texts[place]
        return found


def unit_table(logs: Iterable[UserLog | Interactions], codes: ItemCodes) -> tuple[pa.Table | None, DataError | None]:
    """What a unit of the log holds, up to the row that is wrong, and what is wrong with that; None: nothing."""
    tables, batch, error = [], [], None
    try:
        for log in logs:
            if isinstance(log, Interactions):
                tables += [log.table(codes.of)] if len(log) else []
                continue
            batch.append(log)
            if len(batch) == LOGS_AT_ONCE:
                tables.append(_user_table(batch, codes))
                batch = []
    except DataError as found:
        error = found
    if batch:
        tables.append(_user_table(batch, codes))
    return pa.concat_tables(tables).combine_chunks() if tables else None, error


def _user_table(logs: Sequence[UserLog], codes: ItemCodes) -> pa.Table:
    lists = [[getattr(log, name) for log in logs] for name in LISTS]
    ids = pa.array(chain.from_iterable(chain.from_iterable(lists)), pa.large_string()).dictionary_encode()
    lengths = [np.fromiter(map(len, column), np.int64, len(logs)) for column in lists]
    items = codes.of(ids.dictionary)[ids.indices.to_numpy()]
    values = np.split(items, np.cumsum([part.sum() for part in lengths])[:-1])
    columns = {
        "user": pa.array([log.user for log in logs], pa.string()),
        **{name: Ragged.of(*pair).arrow() for name, *pair in zip(LISTS, values, lengths, strict=True)},
        "time": pa.array([log.time for log in logs], pa.int64()),
        "row": pa.array([log.row for log in logs], pa.int64()),
        "problem": pa.array([log.problem for log in logs], pa.string()),
        "counted": pa.array([log.counted for log in logs], pa.string()),
    }
    return pa.table(columns)


@dataclass(frozen=True, slots=True)
class KnownUser:
    """A user whose items are rows of the catalogue."""

    user: str
    history: list[int]
    """Everything before the targets, oldest first, not cut."""
    targets: list[int]
    time: int
    shown: list[int]


@dataclass(frozen=True, slots=True)
class UserColumns:
    """Several users."""

    names: pa.Array
    history: Ragged
    targets: Ragged
    times: np.ndarray
    """int64 [users]."""
    shown: Ragged

    def __len__(self) -> int:
        return len(self.names)

    def take(self, places: np.ndarray) -> UserColumns:
        """Some of them (int64)."""
        history, targets, shown = (column.take(places) for column in self.lists)
        return UserColumns(self.names.take(pa.array(places)), history, targets, self.times[places], shown)

    def joined(self, other: UserColumns) -> UserColumns:
        """With others behind them."""
        history, targets, shown = (mine.joined(more) for mine, more in zip(self.lists, other.lists, strict=True))
        names = pa.concat_arrays([self.names, other.names])
        return UserColumns(names, history, targets, np.append(self.times, other.times), shown)

    @classmethod
    def from_users(cls, users: Sequence[KnownUser]) -> UserColumns:
        """The same users."""
        history, targets, shown = (Ragged.from_lists([getattr(user, name) for user in users]) for name in LISTS)
        names = pa.array([user.user for user in users], pa.large_string())
        return cls(names, history, targets, np.array([user.time for user in users], np.int64), shown)

    @property
    def lists(self) -> tuple[Ragged, Ragged, Ragged]:
        """In the order of ``LISTS``."""
        return self.history, self.targets, self.shown

    @classmethod
    def from_arrow(cls, batches: Sequence[pa.RecordBatch]) -> UserColumns:
        """From batches of ``table``."""
        names = pa.concat_arrays([batch.column("user").cast(pa.large_string()) for batch in batches])
        history, targets, shown = (Ragged.from_arrow([batch.column(name) for batch in batches]) for name in LISTS)
        return cls(
            names, history, targets, np.concatenate([batch.column("time").to_numpy() for batch in batches]), shown
        )

    def table(self) -> pa.Table:
        """The users in the columns ``user``, ``time`` and ``LISTS``."""
        lists = {name: column.arrow() for name, column in zip(LISTS, self.lists, strict=True)}
        return pa.table({"user": self.names.cast(pa.string()), "time": self.times, **lists})

    def count(self, column: str, users: np.ndarray, num_items: int) -> np.ndarray:
        """int64 [items]: how often each item stands in a list of the users where ``users`` (bool) is true."""
        items = getattr(self, column)
        return np.bincount(items.values[users[items.owners]], minlength=num_items)

    def first_seen(self, num_items: int) -> np.ndarray:
        """int64 [items], seconds: when an item is first known to have been met.

        Items of a history were met before the user's time, targets and shown items at that time. Never, or by users
        without a time (0) alone: ``NEVER``.
        """
        first = np.full(num_items, NEVER)
        for items, earlier in zip(self.lists, (1, 0, 0), strict=True):
            times = self.times[items.owners]
            np.minimum.at(first, items.values[times != 0], times[times != 0] - earlier)
        return first

    def user(self, place: int) -> KnownUser:
        """One of them."""
        history, targets, shown = (column.list(place) for column in self.lists)
        return KnownUser(self.names[place].as_py(), history, targets, int(self.times[place]), shown)


@dataclass(frozen=True, slots=True)
class UserLogs:
    """Users, each once, whose items have the numbers of ``ItemCodes``."""

    users: UserColumns
    rows: np.ndarray
    """int64 [users], of the log, for messages."""
    places: np.ndarray
    """int64 [users]: in which order one reader of the whole log would have judged them."""
    problems: Mapping[int, str]
    """What is wrong with a user's row, by place in the arrays."""


def gather(batches: Sequence[pa.RecordBatch], repeats: str, counts: Counts) -> UserLogs:
    """The users of one part of all units.

    Args:
        batches: of the units, in the log's order.
        repeats: name of the count of a user's further rows.
        counts: what happened.
    """
    filled = [(unit, batch) for unit, batch in enumerate(batches) if batch.num_rows]
    if not filled:
        return UserLogs(UserColumns.from_users([]), np.empty(0, np.int64), np.empty(0, np.int64), {})
    units, batches = zip(*filled, strict=True)
    names = pa.concat_arrays([batch.column("user").cast(pa.large_string()) for batch in batches]).dictionary_encode()
    if "items" in batches[0].schema.names:
        return _of_interactions(names, batches, counts)
    first = np.unique(names.indices.to_numpy(), return_index=True)[1]
    if further := len(names) - len(first):
        counts[repeats] += further
    table = pa.Table.from_batches(batches).select(["row", "problem", "counted"]).take(pa.array(first))
    for found in table["counted"].value_counts().to_pylist():
        if found["values"]:
            counts[found["values"]] += found["counts"]
    rows, units = table["row"].to_numpy(), np.repeat(units, [len(batch) for batch in batches])[first]
    problems = {place: text for place, text in enumerate(table["problem"].to_pylist()) if text}
    users = UserColumns.from_arrow(batches).take(first)
    return UserLogs(users, rows, (units << BITS_OF_A_ROW) + rows, problems)


def _of_interactions(names: pa.DictionaryArray, batches: Sequence[pa.RecordBatch], counts: Counts) -> UserLogs:
    items, times, rows = (
        Ragged.from_arrow([batch.column(name) for batch in batches]) for name in ("items", "times", "rows")
    )
    owners = np.repeat(names.indices.to_numpy(), items.lengths)
    clicks, latest, firsts = joined_clicks(owners, items.values, times.values, rows.values, counts)
    history, targets = clicks.parted()
    none = Ragged.of(np.empty(0, np.int32), np.zeros(len(history), np.int64))
    users = UserColumns(names.dictionary, history, targets, times.values[latest].astype(np.int64), none)
    return UserLogs(users, rows.values[latest], AFTER_ALL + firsts, {})
