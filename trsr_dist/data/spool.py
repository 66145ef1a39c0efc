"""The first pass over raw data, kept in temporary Arrow files: items and admitted users in the files' order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from trsr_dist.data.histories import HistoryRules, KnownUser, admit, with_more_targets
from trsr_dist.data.items import CatalogueRules
from trsr_dist.data.source import Counts, Reader
from trsr_dist.data.store import ITEM_SCHEMA, ROWS_PER_BATCH, ArrowRows, ArrowWriter
from trsr_dist.log import progress
from trsr_dist.records import UserLog

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


def spool_items(path: Path, reader: Reader, rules: CatalogueRules) -> None:
    """Write the catalogue's items; their rows are in ``rules.rows`` afterwards."""
    with ArrowWriter(path, SPOOL_ITEM_SCHEMA) as writer:
        for item in rules.admit(progress(reader.items(), description="items", unit=" items")):
            writer.add(item.id, item.text, item.category)


def spool_users(path: Path, logs: Iterable[UserLog], rows: dict[str, int], rules: HistoryRules, counts: Counts) -> None:
    """Write the users that the filters admit."""
    with ArrowWriter(path, SPOOL_USER_SCHEMA) as writer:
        for log in progress(logs, description="users", unit=" users"):
            user = admit(log, rows, rules, counts)
            if user is not None:
                writer.add(user.user, user.history, user.targets, user.time, user.shown)


def spool_more_targets(path: Path, spool: Spool, users: np.ndarray, num_targets: int, min_history: int) -> Spool:
    """Write the same users again, those where ``users`` (bool) is true with up to ``num_targets`` targets."""
    with ArrowWriter(path, SPOOL_USER_SCHEMA) as writer:
        for row in range(len(spool)):
            user = spool.user(row)
            if users[row]:
                user = with_more_targets(user, num_targets, min_history)
            writer.add(user.user, user.history, user.targets, user.time, user.shown)
    return Spool(path)


class Spool:
    """Random access to the admitted users and sums over their clicks."""

    def __init__(self, path: Path) -> None:
        self._rows = ArrowRows(path)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def times(self) -> np.ndarray:
        """int64 [users], seconds."""
        return self._rows.column("time")

    def keys(self) -> Iterable[str]:
        for batch in self._rows.batches:
            yield from batch.column("user").to_pylist()

    def user(self, index: int) -> KnownUser:
        return KnownUser(*(self._rows.value(column, index) for column in range(5)))

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
