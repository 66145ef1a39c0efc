"""Many users' logs in columns, as they are taken in. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa

from trsr_dist.data.ragged import Ragged
from trsr_dist.errors import DataError
from trsr_dist.records import UserLog

LOGS_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True)
class LogColumns:
    """The fields of ``UserLog``; items are places in ``ids``."""

    names: pa.Array
    ids: pa.Array
    """Each once."""
    history: Ragged
    targets: Ragged
    times: np.ndarray
    """int64 [logs]."""
    shown: Ragged
    source: Callable[[int], str]
    """Of the log at a place."""

    @classmethod
    def of(cls, logs: Sequence[UserLog]) -> LogColumns:
        """The same logs."""
        lists = [[getattr(log, name) for log in logs] for name in ("history", "targets", "shown")]
        codes = pa.array(chain.from_iterable(chain.from_iterable(lists)), pa.large_string()).dictionary_encode()
        lengths = [np.fromiter(map(len, column), np.int64, len(logs)) for column in lists]
        values = np.split(codes.indices.to_numpy(), np.cumsum([part.sum() for part in lengths])[:-1])
        history, targets, shown = map(Ragged.of, values, lengths)
        names, times = pa.array([log.user for log in logs]), np.array([log.time for log in logs], np.int64)
        return cls(names, codes.dictionary, history, targets, times, shown, lambda place: logs[place].source)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lists(self) -> tuple[Ragged, Ragged, Ragged]:
        """History, targets, shown."""
        return self.history, self.targets, self.shown

    def log(self, place: int) -> UserLog:
        """One of them."""
        history, targets, shown = (
            tuple(self.ids.take(pa.array(column.list(place), pa.int32())).to_pylist()) for column in self.lists
        )
        user, time = self.names[place].as_py(), int(self.times[place])
        return UserLog(user, history, targets, time, shown, self.source(place))


def in_columns(logs: Iterable[UserLog | LogColumns]) -> Iterator[LogColumns]:
    """Single logs are gathered; where reading fails, those before come first, for they may be wrong too."""
    batch: list[UserLog] = []
    try:
        for log in logs:
            if isinstance(log, LogColumns):
                yield log
                continue
            batch.append(log)
            if len(batch) == LOGS_AT_ONCE:
                yield LogColumns.of(batch)
                batch = []
    except DataError:
        yield LogColumns.of(batch)
        raise
    yield LogColumns.of(batch)
