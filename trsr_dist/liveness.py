"""Who is alive on a shared disk: owners, the file server's clock, signs of life.

Made for NFS. Every age is the difference of two of the file server's stamps, so that no host's clock matters.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trsr_dist.environment import detect_ranks, process_start
from trsr_dist.errors import DataError
from trsr_dist.json_text import parse_json

STALE_READS = 5
MAX_SIGN_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds or writes something. One that nobody knows has no host."""

    host: str = ""
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
        return cls(ranks.host, pid, process_start(pid), ranks.job_id, ranks.restart, task or secrets.token_hex(8))

    @classmethod
    def of(cls, record: dict[str, Any]) -> Owner:
        """From a file's record, which may hold anything."""
        values = {field.name: record.get(field.name, field.default) for field in fields(cls)}
        return cls(**values) if all(type(v) is type(getattr(cls(), k)) for k, v in values.items()) else cls()

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


def has_ended(pid: int, started: str) -> bool:
    """Whether the process of this host that began at ``started`` is gone."""
    if start := process_start(pid):
        return start != started
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's, which /proc may hide (hidepid)
        return False
    except (OSError, OverflowError):
        pass
    return True


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


def server_time_ns(folder: Path) -> int:
    """Now, by the clock that stamps the folder's files: the stamp of one just touched there."""
    with tempfile.TemporaryFile(dir=folder, prefix=f".clock.tmp-{signature()}-") as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime_ns


def reader_time(folder: Path) -> float:
    """Unix seconds by the folder's clock; by this host's where it may not be written, as for a colleague who looks."""
    try:
        return server_time_ns(folder) / 1e9
    except OSError:
        return time.time()


def signature(owner: Owner | None = None) -> str:
    """A process in the name of what it writes; without an owner: this one."""
    owner = owner or Owner(socket.gethostname(), os.getpid(), process_start(os.getpid()))
    return f"{owner.host}-{owner.pid}-{owner.started}"


def is_abandoned(path: Path, silent_seconds: float, dead: Owner | None = None) -> bool:
    """Whether the process that signed the name of this file or folder has ended.

    Args:
        path: its name ends in a signature and a token.
        silent_seconds: a process of another host counts as dead when it has written nothing for so long.
        dead: an owner on another host that is known to be.
    """
    signed = path.name.rpartition("-")[0]
    if found := re.search(rf"\.\w+-{re.escape(socket.gethostname())}-(\d+)-(\d+)$", signed):
        return has_ended(int(found[1]), found[2])
    if dead is not None and signed.endswith(f"-{signature(dead)}"):
        return True
    try:
        newest = max(file.lstat().st_mtime_ns for file in (path, *path.rglob("*")))
    except FileNotFoundError:  # at work, or gone
        return False
    return server_time_ns(path.parent) - newest > silent_seconds * 1e9


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
