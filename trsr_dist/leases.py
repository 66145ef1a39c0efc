"""Locks in a shared folder: one holder at a time, none for ever.

A lock is a file created by a hard link, so that it is never seen empty, and kept alive by touching it. Who takes a dead
owner's lock puts its own in its place.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trsr_dist.liveness import Beat, Owner, Sign, read_sign
from trsr_dist.processes import server_time_ns, signature

BEATS_PER_TERM = 6
LOOKS_PER_TERM = 20
SHORTEST_LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.1, 10.0
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


@dataclass(slots=True)
class Lease:
    """A lock held by this process; another may have taken it over since."""

    path: Path
    name: str
    former: str = ""
    """Signature of the dead owner that it was taken from; empty where there was none."""
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
        lease = Lease(path, name, sign.owner.signature if sign else "")
        with self._guard:
            self._held[name] = lease
        self._beat = self._beat or Beat(self.lease_seconds / BEATS_PER_TERM, self._touch_held)
        return lease

    def taken(self) -> set[str]:
        """Names of all locks that somebody has, or had and died, by one look into the folder."""
        return set(os.listdir(self.folder))

    def is_held(self, lease: Lease) -> bool:
        """Whether this process still holds the lock: read from the folder."""
        if not lease.lost:
            sign = read_sign(lease.path)
            lease.lost = sign is None or sign.owner != self.owner
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
        draft = self._draft(path)
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

    def _draft(self, path: Path) -> Path:
        draft = self._hidden(path)
        _write_new(draft, json.dumps(asdict(self.owner)).encode())
        return draft

    def _hidden(self, path: Path) -> Path:
        return path.with_name(f".{path.name.lstrip('.')}.tmp-{signature()}-{secrets.token_hex(8)}")

    def _take_over(self, path: Path, sign: Sign) -> bool:
        """Put this process's lock in the place of a dead one, which only one at a time may do.

        That one is who creates the first guard that is free, all before it being of processes that were killed here.
        """
        killed: list[Path] = []
        while not self._create(guard := path.with_name(f".{path.name.lstrip('.')}.takeover{len(killed) or ''}")):
            left = read_sign(guard)
            if left is None or not self.is_dead(guard, left):
                return False
            killed.append(guard)
        try:
            found = read_sign(path)
            if found is None or found.record != sign.record or not self.is_dead(path, found):
                return False
            os.rename(self._draft(path), path)
            for old in killed:
                old.unlink(missing_ok=True)
            return True
        finally:
            guard.unlink(missing_ok=True)

    def _remove(self, path: Path, record: dict[str, Any]) -> None:
        """Remove the file that holds this record, and no other: what another process has put there goes back."""
        aside = self._hidden(path)
        with suppress(FileNotFoundError):
            os.rename(path, aside)
            sign = read_sign(aside)
            if sign is not None and sign.record != record:
                with suppress(FileExistsError):
                    _write_new(path, aside.read_bytes())
            aside.unlink()

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
