"""Who is alive on a shared disk: owners and their signs of life."""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trsr_dist.environment import detect_ranks
from trsr_dist.errors import DataError
from trsr_dist.files import STALE_READS
from trsr_dist.json_text import parse_json
from trsr_dist.processes import has_ended, host_name, process_start, server_time_ns

MAX_SIGN_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds or writes something. One that nobody knows has no host."""

    host: str = ""
    """See ``processes.host_name``."""
    pid: int = 0
    started: str = ""
    """Start time of the process in clock ticks, so that a later process with its number is told apart."""
    job: str = ""
    restart: int = 0
    """Requeue count of the job: a higher one means that the lower ones are dead."""
    task: str = ""
    """Unique among all that ever hold something in the folder."""

    @classmethod
    def myself(cls, task: str = "") -> Owner:
        ranks, pid = detect_ranks(), os.getpid()
        return cls(host_name(), pid, process_start(pid), ranks.job_id, ranks.restart, task or secrets.token_hex(8))

    @classmethod
    def of(cls, record: dict[str, Any]) -> Owner:
        """From a file's record, which may hold anything."""
        values = {field.name: record.get(field.name, field.default) for field in fields(cls)}
        return cls(**values) if all(type(v) is type(getattr(cls(), k)) for k, v in values.items()) else cls()

    @property
    def signature(self) -> str:
        """In the names of what it writes, see ``processes.signature``."""
        return f"{self.host}-{self.pid}-{self.started}"

    def is_gone(self, me: Owner) -> bool:
        """Whether it is certainly dead: its process has ended on this host, or a later start of its Slurm job asks."""
        if self.started and self.host == me.host and has_ended(self.pid, self.started):
            return True
        return self.is_superseded_by(me)

    def is_superseded_by(self, other: Owner) -> bool:
        """Whether the other is a later start of the same Slurm job: this one may live on behind a broken network."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return (
            f"pid {self.pid} on {self.host}{job}" if self.host else "an unknown process (the file does not say which)"
        )


@dataclass(frozen=True, slots=True)
class Sign:
    """A file by which a process shows that it lives."""

    record: dict[str, Any]
    """Empty where the file is empty, damaged, or may not be read."""
    stamp_ns: int
    """Of the last touch, by the file server's clock."""

    @property
    def owner(self) -> Owner:
        return Owner.of(self.record)


def read_sign(path: Path) -> Sign | None:
    """Content and stamp of a small file that others replace or remove; None where there is none.

    Read through an open file: NFS answers a bare stat from a cache, and what was replaced with a stale handle.

    Raises:
        OSError: names the path.
    """
    for _ in range(STALE_READS):
        try:
            return _read_sign(path)
        except FileNotFoundError:
            return None
        except PermissionError:
            return Sign({}, path.stat().st_mtime_ns)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise OSError(error.errno, error.strerror, str(path)) from None
    return None


def _read_sign(path: Path) -> Sign:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            record = parse_json(os.read(descriptor, MAX_SIGN_BYTES))
        except DataError:
            record = {}
        return Sign(record, os.fstat(descriptor).st_mtime_ns)
    finally:
        os.close(descriptor)


def reader_time(folder: Path) -> float:
    """Unix seconds by the folder's clock; by this host's where it may not be written, as for a colleague who looks."""
    try:
        return server_time_ns(folder) / 1e9
    except OSError:
        return time.time()


class Beat:
    """Calls a function every few seconds, in a thread, until it is stopped."""

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._seconds, self._action = seconds, action
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            with suppress(OSError):  # a shared disk that fails for a moment must not end the beats
                self._action()


@contextmanager
def touching(path: Path, seconds: float) -> Iterator[None]:
    """Touch a file every few seconds within this context."""
    beat = Beat(seconds, lambda: os.utime(path))
    try:
        yield
    finally:
        beat.stop()
