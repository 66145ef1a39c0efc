"""Which users count, and with which items: the length filters and the policies.

What the first pass over raw data has admitted is kept in temporary Arrow files, in the raw files' order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from trsr_dist.data.items import REMOVED, CatalogueRules
from trsr_dist.data.logs import LogColumns, in_columns
from trsr_dist.data.ragged import Ragged
from trsr_dist.data.source import Counts, Reader, shown
from trsr_dist.data.store import ITEM_SCHEMA, ROWS_PER_BATCH, ArrowRows, ArrowWriter
from trsr_dist.errors import DataError
from trsr_dist.log import progress
from trsr_dist.records import UserLog

LISTS = ("history", "targets", "shown")
UNKNOWN = -2
"""Row of an id that the catalogue lacks; one that it left out has ``REMOVED``."""
SPOOL_ITEM_SCHEMA = pa.schema(list(ITEM_SCHEMA)[:3])
SPOOL_USER_SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("history", pa.list_(pa.int32())),
        ("targets", pa.list_(pa.int32())),
        ("time", pa.int64()),
        ("shown", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True, slots=True)
class HistoryRules:
    """The settings of the same names in the data section."""

    min_history: int
    max_history: int
    long_histories: str
    repeated_target: str
    unknown_items: str


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
        lists = (column.take(places) for column in (self.history, self.targets, self.shown))
        history, targets, shown = lists
        return UserColumns(self.names.take(pa.array(places)), history, targets, self.times[places], shown)

    def joined(self, users: Sequence[KnownUser]) -> UserColumns:
        """With others behind them."""
        names = pa.concat_arrays([self.names, pa.array([user.user for user in users], self.names.type)])
        history, targets, shown = (
            column.joined(Ragged.from_lists([getattr(user, name) for user in users]))
            for name, column in zip(LISTS, (self.history, self.targets, self.shown), strict=True)
        )
        times = np.append(self.times, np.array([user.time for user in users], np.int64))
        return UserColumns(names, history, targets, times, shown)

    def arrow(self) -> list[pa.Array]:
        """In the columns of ``SPOOL_USER_SCHEMA``."""
        history, targets, shown = (column.arrow() for column in (self.history, self.targets, self.shown))
        return [self.names.cast(pa.string()), history, targets, pa.array(self.times), shown]

    def user(self, place: int) -> KnownUser:
        """One of them."""
        history, targets, shown = (column.list(place) for column in (self.history, self.targets, self.shown))
        return KnownUser(self.names[place].as_py(), history, targets, int(self.times[place]), shown)


def admit_all(logs: LogColumns, rows: np.ndarray, rules: HistoryRules, counts: Counts) -> UserColumns:
    """What ``admit`` lets through. Plain users, whom no rule concerns, are let through all at once.

    Args:
        logs: the users.
        rows: int32 [logs.ids], of the catalogue; ``REMOVED`` and ``UNKNOWN`` are among them.
        rules: who counts.
        counts: what happened.

    Raises:
        DataError: of ``admit``.
    """
    history, targets, shown = (Ragged(rows[column.values], column.ends) for column in logs.lists)
    users = UserColumns(logs.names, history, targets, logs.times, shown)
    is_plain = _is_plain(users, rules)
    plain, places = np.flatnonzero(is_plain), np.flatnonzero(~is_plain)
    if len(plain):
        counts["users_read"] += len(plain)
        counts["item_ids_read"] += int(sum(column.lengths[plain].sum() for column in logs.lists))
    if not len(places):
        return users
    admitted = {
        place: user
        for place in places.tolist()
        if (user := admit(logs.log(place), users.user(place), rules, counts)) is not None
    }
    order = np.argsort(np.append(plain, np.array([*admitted], np.int64)))
    return users.take(plain).joined(list(admitted.values())).take(order)


def _is_plain(users: UserColumns, rules: HistoryRules) -> np.ndarray:
    """bool [users]: all items known, one target, which is new to the user, and a history of a length within limits."""
    lengths, is_plain = users.history.lengths, users.targets.lengths == 1
    targets = np.full(len(users), UNKNOWN)
    targets[is_plain] = users.targets.values[users.targets.ends[:-1][is_plain]]
    is_plain &= lengths >= max(1, rules.min_history)
    if rules.max_history:
        is_plain &= lengths <= rules.max_history
    is_plain &= targets >= 0
    for column in (users.history, users.shown):
        owners = column.owners
        is_plain[owners[(column.values < 0) | (column.values == targets[owners])]] = False
    return is_plain


def admit(log: UserLog, found: KnownUser, rules: HistoryRules, counts: Counts) -> KnownUser | None:
    """The user in rows of the catalogue, or None where a filter leaves the user out; either way it is counted.

    Args:
        log: the user.
        found: the same with rows of the catalogue; ``REMOVED`` and ``UNKNOWN`` are among them.
        rules: who counts.
        counts: what happened.

    Raises:
        DataError: an id is not in the catalogue and the policy is ``fail``.
    """
    counts["users_read"] += 1
    if not log.history:
        return _skip("users_with_empty_history", counts)
    history, targets, shown = found.history, found.targets, found.shown
    counts["item_ids_read"] += len(history) + len(targets) + len(shown)
    history = _known(log.history, history, log, rules, counts)
    targets = list(dict.fromkeys(_known(log.targets, targets, log, rules, counts)))
    shown = _known(log.shown, shown, log, rules, counts)
    if not targets:
        return _skip("users_without_target", counts)
    if len(history) < rules.min_history:
        return _skip("users_below_min_history", counts)
    if rules.max_history and len(history) > rules.max_history:
        if rules.long_histories == "skip":
            return _skip("users_above_max_history", counts)
        counts["users_with_cut_history"] += 1
    repeated = set(targets).intersection(history)
    if repeated and rules.repeated_target == "drop":
        counts["repeated_targets_dropped"] += len(repeated)
        targets = [row for row in targets if row not in repeated]
        if not targets:
            return _skip("users_with_repeated_target_dropped", counts)
    elif repeated:
        counts["users_with_repeated_target_kept"] += 1
    return KnownUser(log.user, history, targets, log.time, [row for row in shown if row not in targets])


def with_more_targets(user: KnownUser, num_targets: int, min_history: int) -> KnownUser:
    """The history's latest items join the targets, oldest first, until there are ``num_targets``.

    At least ``min_history`` items, and one, remain; an item that was met before is no target.
    """
    remaining = max(min_history, 1, len(user.history) - max(num_targets - len(user.targets), 0))
    history, moved = user.history[:remaining], user.history[remaining:]
    known = set(history)
    targets = [item for item in dict.fromkeys([*moved, *user.targets]) if item not in known or item in user.targets]
    return replace(user, history=history, targets=targets)


def _skip(reason: str, counts: Counts) -> None:
    counts[reason] += 1


def _known(items: Sequence[str], found: list[int], log: UserLog, rules: HistoryRules, counts: Counts) -> list[int]:
    if not found or min(found) >= 0:
        return found
    known = []
    for item, row in zip(items, found, strict=True):
        if row == UNKNOWN:
            if rules.unknown_items == "fail":
                raise DataError(
                    f"{log.source}: user {shown(log.user)} has item {shown(item)}, which the item file lacks; add the "
                    "item, or set data.unknown_items=skip to leave such clicks out and count them"
                )
            counts["clicks_on_unknown_items"] += 1
        elif row == REMOVED:
            counts["clicks_on_items_without_text"] += 1
        else:
            known.append(row)
    return known


def spool_items(path: Path, reader: Reader, rules: CatalogueRules) -> None:
    """Write the catalogue's items; their rows are in ``rules.rows`` afterwards."""
    with ArrowWriter(path, SPOOL_ITEM_SCHEMA) as writer:
        for item in rules.admit(progress(reader.items(), description="items", unit=" items")):
            writer.add(item.id, item.text, item.category)


def spool_users(
    path: Path,
    logs: Iterable[UserLog | LogColumns],
    rows: Mapping[str, int],
    rules: HistoryRules,
    counts: Counts,
) -> None:
    """Write the users that the filters admit."""
    ids, places = None, np.empty(0, np.int32)
    with ArrowWriter(path, SPOOL_USER_SCHEMA) as writer, progress(description="users", unit=" users") as bar:
        for batch in in_columns(logs):
            if batch.ids is not ids:
                ids = batch.ids
                places = np.array([rows.get(item, UNKNOWN) for item in ids.to_pylist()], np.int32)
            writer.add_columns(admit_all(batch, places, rules, counts).arrow())
            bar.update(len(batch))


def spool_more_targets(path: Path, spool: Spool, users: np.ndarray, num_targets: int, min_history: int) -> Spool:
    """Write the same users again, those where ``users`` (bool) is true with up to ``num_targets`` targets."""
    with ArrowWriter(path, SPOOL_USER_SCHEMA) as writer:
        for start in range(0, len(spool), ROWS_PER_BATCH):
            rows = np.arange(start, min(start + ROWS_PER_BATCH, len(spool)))
            found = spool.users(rows)
            for place, row in enumerate(rows):
                user = found.user(place)
                if users[row]:
                    user = with_more_targets(user, num_targets, min_history)
                writer.add(user.user, user.history, user.targets, user.time, user.shown)
    return Spool(path)


class Spool:
    """Random access to the admitted users and sums over their clicks."""

    def __init__(self, path: Path) -> None:
        self._rows = ArrowRows(path)
        batches = self._rows.batches or [pa.RecordBatch.from_pylist([], SPOOL_USER_SCHEMA)]
        self.times = self._rows.column("time")
        """int64 [users], seconds."""
        self._names = pa.concat_arrays([batch.column("user").cast(pa.large_string()) for batch in batches])
        self._lists = {name: Ragged.from_arrow([batch.column(name) for batch in batches]) for name in LISTS}

    def __len__(self) -> int:
        return len(self._rows)

    def keys(self) -> Iterable[str]:
        for batch in self._rows.batches:
            yield from batch.column("user").to_pylist()

    def users(self, rows: np.ndarray) -> UserColumns:
        """Those of some rows (int64)."""
        names = self._names.take(pa.array(rows))
        history, targets, shown = (self._lists[name].take(rows) for name in LISTS)
        return UserColumns(names, history, targets, self.times[rows], shown)

    def count(self, column: str, users: np.ndarray, num_items: int) -> np.ndarray:
        """int64 [items]: how often each item stands in ``column`` of the users where ``users`` (bool) is true."""
        total = np.zeros(num_items, np.int64)
        for items, owners in self._flat(column):
            total += np.bincount(items[users[owners]], minlength=num_items)
        return total

    def first_seen(self, users: np.ndarray, num_items: int) -> np.ndarray:
        """int64 [items], seconds: when an item is first known to have been met by one of ``users`` (bool).

        Items of a history were met before the user's time, targets and shown items at that time. Never, or by users
        without a time (0) alone: the largest int64.
        """
        first = np.full(num_items, np.iinfo(np.int64).max)
        times = self.times
        for column, earlier in (("history", 1), ("targets", 0), ("shown", 0)):
            for items, owners in self._flat(column):
                kept = (users & (times != 0))[owners]
                np.minimum.at(first, items[kept], times[owners[kept]] - earlier)
        return first

    def _flat(self, column: str) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Batch by batch: the items of a list column in a row, and which user each belongs to."""
        for i, batch in enumerate(self._rows.batches):
            lists = batch.column(column)
            owners = i * ROWS_PER_BATCH + np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
            yield lists.flatten().to_numpy(), owners
