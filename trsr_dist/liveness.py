"""Who is alive on a shared disk: owners, the file server's clock, signs of life, and locks that pass on.

Made for NFS: a lock is a file created by a hard link and kept alive by touching it. Every age is the difference of two
of the file server's stamps, so that no host's clock matters. Who takes a dead owner's lock puts its own in its place.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trsr_dist.environment import detect_ranks, process_start
from trsr_dist.errors import DataError
from trsr_dist.json_text import parse_json

STALE_READS = 5
MAX_SIGN_BYTES = 2**20
BEATS_PER_TERM = 6
LOOKS_PER_TERM = 20
SHORTEST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.1, 10.0
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


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


@dataclass(slots=True)
class Lease:
    """A lock held by this process; another may have taken it over since."""

    path: Path
    name: str
    former: Owner | None = None
    """The dead owner that it was taken from."""
    lost: bool = False


class LeaseFolder:
    """Take, keep and give back the locks of a folder.

    Args:
        folder: shared by all tasks.
        owner: this process; no two instances share one.
        lease_seconds: a lock without a sign of life for this long is taken over.
    """

    def __init__(self, folder: Path, owner: Owner, lease_seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.owner = owner
        self.lease_seconds = lease_seconds
        self.look_seconds = min(max(lease_seconds / LOOKS_PER_TERM, SHORTEST_LOOK_SECONDS), LONGEST_LOOK_SECONDS)
        """Worth waiting between two looks at what others hold: many waiting tasks must not wear the file server out."""
        self._clock = (float("-inf"), 0)
        self._held: dict[str, Lease] = {}
        self._guard = threading.Lock()
        self._beat: Beat | None = None

    def acquire(self, name: str) -> Lease | None:
        """The lock, or None where another live task holds it."""
        path = self.folder / name
        sign = read_sign(path)
        if not (self._create(path) if sign is None else self.is_dead(path, sign) and self._take_over(path, sign)):
            return None
        lease = Lease(path, name, sign and sign.owner)
        with self._guard:
            self._held[name] = lease
        self._beat = self._beat or Beat(self.lease_seconds / BEATS_PER_TERM, self._touch_held)
        return lease

    def is_held(self, lease: Lease) -> bool:
        """Whether this process still holds the lock: read from the folder."""
        lease.lost = lease.lost or not self._is_mine(lease.path)
        return not lease.lost

    def release(self, lease: Lease) -> None:
        """Give a lock back, lost or not."""
        with self._guard:
            self._held.pop(lease.name, None)
        if self.is_held(lease):
            self._remove(lease.path, asdict(self.owner))

    @contextmanager
    def holding(self, name: str) -> Iterator[bool]:
        """Hold a lock for the length of a block, or learn that another task has it."""
        lease = self.acquire(name)
        try:
            yield lease is not None
        finally:
            if lease is not None:
                self.release(lease)

    def close(self) -> None:
        """Give everything back."""
        if self._beat is not None:
            self._beat.stop()
        for lease in list(self._held.values()):
            self.release(lease)

    def is_dead(self, path: Path, sign: Sign) -> bool:
        """Whether the file's owner has ended, or has not touched it for too long.

        A stamp in the future, left when the server's clock was set back, says nothing: from now on its age counts.
        """
        if sign.owner.is_gone(self.owner):
            return True
        age = self.age_seconds(sign)
        if age < -self.lease_seconds / BEATS_PER_TERM:
            with suppress(OSError):
                os.utime(path)
        return age > self.lease_seconds

    def age_seconds(self, sign: Sign) -> float:
        """Since the last sign of life, by the file server's clock."""
        now, (then, stamp) = time.monotonic(), self._clock
        if now - then >= self.look_seconds:
            then, stamp = self._clock = now, server_time_ns(self.folder)
        return (stamp - sign.stamp_ns) / 1e9 + now - then

    def _create(self, path: Path) -> bool:
        """Create the lock with its content in one step, so that no reader finds it empty.

        Without hard links a reader may find it empty for a moment, and judges it by its age.
        """
        draft = self._draft()
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _write_new(path, draft.read_bytes())
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _draft(self) -> Path:
        draft = self._hidden("draft")
        _write_new(draft, json.dumps(asdict(self.owner)).encode())
        return draft

    def _hidden(self, kind: str) -> Path:
        return self.folder / f".{kind}.tmp-{signature()}-{secrets.token_hex(8)}"

    def _take_over(self, path: Path, sign: Sign) -> bool:
        """Put this process's lock in the place of a dead one, which only one at a time may do."""
        guard = path.with_name(f".{path.name.lstrip('.')}.takeover")
        left = read_sign(guard)
        if left is not None and self.is_dead(guard, left):
            self._remove(guard, left.record)  # of a process that was killed while it took over
        if not self._create(guard):
            return False
        try:
            found = read_sign(path)
            if found is None or found.record != sign.record or not self.is_dead(path, found):
                return False
            os.rename(self._draft(), path)
            return True
        finally:
            self._remove(guard, asdict(self.owner))

    def _is_mine(self, path: Path) -> bool:
        sign = read_sign(path)
        return sign is not None and sign.owner == self.owner

    def _remove(self, path: Path, record: dict[str, Any]) -> None:
        """Remove the file that holds this record, and no other: what another process has put there goes back."""
        tomb = self._hidden("removed")
        with suppress(FileNotFoundError):
            os.rename(path, tomb)
            sign = read_sign(tomb)
            if sign is not None and sign.record != record:
                with suppress(FileExistsError):
                    _write_new(path, tomb.read_bytes())
            tomb.unlink()

    def _touch_held(self) -> None:
        with self._guard:
            held = list(self._held.values())
        for lease in held:
            with suppress(OSError):
                if self.is_held(lease):
                    os.utime(lease.path)


def _write_new(path: Path, content: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    return True
