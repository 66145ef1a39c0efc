"""Leases on units of work in a shared folder: they save double work and expire with their holder.

Made for NFS: a lease is a file created by a hard link, kept alive through its modification time, and every age is the
difference of two of the file server's stamps. What makes results right is not the lease but the commit (``units.py``).
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trsr_dist.environment import process_start
from trsr_dist.errors import DataError
from trsr_dist.files import read_text
from trsr_dist.json_text import parse_json

BEATS_PER_LEASE = 4
LOOKS_PER_LEASE = 20
SHORTEST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.1, 10.0
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lease."""

    task: str
    """Unique among all processes that ever take a lease in the folder."""
    host: str
    pid: int
    started: str
    """Start time of the process in clock ticks, so that a later process with its number is told apart."""
    job_id: str = ""
    restart: int = 0
    """Requeue count of the job: a higher one means that the lower ones are dead."""

    @classmethod
    def myself(cls, task: str, job_id: str = "", restart: int = 0) -> Owner:
        return cls(task, socket.gethostname(), os.getpid(), process_start(os.getpid()), job_id, restart)


@dataclass(slots=True)
class Lease:
    """A unit held by this process."""

    path: Path
    name: str
    lost: bool = False


class LeaseFolder:
    """Take, keep and give back leases.

    Args:
        folder: shared by all tasks.
        owner: this process.
        lease_seconds: a lease without a sign of life for this long is taken over.
    """

    def __init__(self, folder: Path, owner: Owner, lease_seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.owner = owner
        self.lease_seconds = lease_seconds
        self.look_seconds = min(max(lease_seconds / LOOKS_PER_LEASE, SHORTEST_LOOK_SECONDS), LONGEST_LOOK_SECONDS)
        """Worth waiting between two looks at what others hold: many waiting tasks must not wear the file server out."""
        self._clock = (float("-inf"), 0.0)
        self._held: dict[str, Lease] = {}
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, daemon=True)
        self._beat.start()

    def acquire(self, name: str) -> Lease | None:
        """The lease, or None where another live task holds it."""
        path = self.folder / name
        if (path.exists() and not self._remove_if_stale(path)) or not self._create(path):
            return None
        lease = Lease(path, name)
        with self._guard:
            self._held[name] = lease
        return lease

    def is_held(self, lease: Lease) -> bool:
        """Whether this process still holds the lease: read from the folder."""
        lease.lost = lease.lost or self._holder(lease.path) != self.owner
        return not lease.lost

    def release(self, lease: Lease) -> None:
        """Give a lease back, lost or not."""
        with self._guard:
            self._held.pop(lease.name, None)
        if self.is_held(lease):
            lease.path.unlink(missing_ok=True)

    @contextmanager
    def holding(self, name: str) -> Iterator[bool]:
        """Hold a lease for the length of a block, or learn that another task has it."""
        lease = self.acquire(name)
        try:
            yield lease is not None
        finally:
            if lease is not None:
                self.release(lease)

    def holders(self) -> dict[str, Owner]:
        """Who holds what at the moment."""
        found = {path.name: self._holder(path) for path in self.folder.glob("[!.]*")}
        return {name: owner for name, owner in found.items() if owner is not None}

    def close(self) -> None:
        """Give everything back."""
        self._stop.set()
        self._beat.join()
        for lease in list(self._held.values()):
            self.release(lease)
        self._clock_path.unlink(missing_ok=True)

    @property
    def _clock_path(self) -> Path:
        return self.folder / f".clock-{self.owner.task}"

    def _create(self, path: Path) -> bool:
        """Create the lease with its content in one step, so that no reader finds it empty.

        Without hard links a reader may find it empty for a moment, and judges it by its age.
        """
        draft = self.folder / f".draft-{self.owner.task}"
        try:
            draft.write_text(json.dumps(asdict(self.owner)))
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _create_new(path, draft.read_bytes())
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _holder(self, path: Path) -> Owner | None:
        try:
            return parse_json(read_text(path), Owner)
        except (FileNotFoundError, UnicodeDecodeError, DataError):
            return None

    def _remove_if_stale(self, path: Path) -> bool:
        """Move a dead holder's lease out of the way; False where it is alive or another task was faster."""
        holder = self._holder(path)
        if not self._is_dead(holder, path):
            return False
        tomb = self.folder / f".stale-{path.name}-{self.owner.task}"
        try:
            os.rename(path, tomb)
        except FileNotFoundError:
            return True
        if self._holder(tomb) != holder:
            self._put_back(tomb, path)
            return False
        tomb.unlink()
        return True

    def _put_back(self, tomb: Path, path: Path) -> None:
        """Between judging and moving, another task had already taken the stale lease over: give it back."""
        with suppress(FileExistsError):
            os.link(tomb, path)
        tomb.unlink()

    def _is_dead(self, holder: Owner | None, path: Path) -> bool:
        if holder is not None:
            if holder.host == self.owner.host and process_start(holder.pid) != holder.started:
                return True
            if holder.job_id and holder.job_id == self.owner.job_id and holder.restart < self.owner.restart:
                return True
        modified = _modified(path)
        return modified is not None and self._server_time() - modified > self.lease_seconds

    def _server_time(self) -> float:
        """The file server's clock: the stamp of a file just touched, or touched a moment ago."""
        now, (then, stamp) = time.monotonic(), self._clock
        if now - then >= self.look_seconds:
            self._clock_path.touch()
            os.utime(self._clock_path)
            then, stamp = self._clock = now, _modified(self._clock_path) or 0.0
        return stamp + now - then

    def _keep_alive(self) -> None:
        while not self._stop.wait(self.lease_seconds / BEATS_PER_LEASE):
            with self._guard:
                held = list(self._held.values())
            for lease in held:
                try:
                    if self.is_held(lease):
                        os.utime(lease.path)
                except OSError:
                    continue


def _create_new(path: Path, content: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    return True


def _modified(path: Path) -> float | None:
    """Modification time, read through an open file: NFS answers a bare stat from a cache."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(descriptor).st_mtime
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return None
    finally:
        os.close(descriptor)
