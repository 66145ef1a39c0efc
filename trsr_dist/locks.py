"""Locks and claims of folders: one job at a time, or together those of the same settings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trsr_dist.errors import RunError
from trsr_dist.files import real_folder, recover_folder, sweep, write_json
from trsr_dist.leases import BEATS_PER_TERM, Lease, LeaseFolder
from trsr_dist.liveness import Owner, Sign, read_sign, touching

LOCK_STALE_SECONDS = 120.0
LOCK_READS = 10
"""Tries, a second apart, to read a lock on a disk that fails."""
CLAIMS = ".claims"


@dataclass(frozen=True, slots=True)
class FolderLock:
    """A lock that this process has taken; another may have taken it over since."""

    leases: LeaseFolder
    lease: Lease

    def check(self) -> None:
        """Call right before anything is published.

        Raises:
            RunError: the lock is lost: this process was cut off and its work is done elsewhere.
        """
        for attempt in range(LOCK_READS):
            try:
                if self.leases.is_held(self.lease):
                    return
                break
            except OSError:  # a shared disk that fails for a moment must not end a job that holds its lock
                if attempt == LOCK_READS - 1:
                    raise
            time.sleep(1.0)
        sign = read_sign(self.lease.path)
        raise RunError(f"{self.lease.path}: lost to {sign.owner if sign else 'nobody'}; nothing was published")


@contextmanager
def folder_lock(folder: Path) -> Iterator[FolderLock]:
    """Hold ``folder`` for writing against other jobs, on any node, and put right what killed ones have left of it.

    The lock is a file beside the folder, touched every few seconds. It is taken over from a holder that has died, and
    from an earlier start of the same Slurm job: that one may live on behind a broken network, and finds the lock lost
    in ``FolderLock.check``.

    Raises:
        RunError: another live process holds it; names host and pid.
    """
    folder = real_folder(folder)
    path = folder.with_name(f".{folder.name}.lock")
    leases = LeaseFolder(folder.parent, Owner.myself(), LOCK_STALE_SECONDS)
    try:
        lease = leases.acquire(path.name)
        if lease is None:
            sign = read_sign(path)
            if sign is None or leases.is_dead(path, sign):
                raise RunError(f"{path}: another process has just taken this lock; run the command again")
            raise RunError(
                f"{path}: held by {sign.owner} ({max(0.0, leases.age_seconds(sign)):.0f} s since its last sign of "
                "life); wait for it to end, or remove the file if that process is gone; after "
                f"{LOCK_STALE_SECONDS:.0f} s of silence it expires"
            )
        sweep(folder.parent)
        recover_folder(folder, lease.former)
        yield FolderLock(leases, lease)
    finally:
        leases.close()


@dataclass(frozen=True, slots=True)
class Claim:
    """This process among all that are at work on a folder."""

    path: Path
    since: int
    """Nanoseconds, by the file server's clock."""
    leases: LeaseFolder

    def check_alone(self) -> None:
        """Call before removing what others may be writing.

        Raises:
            RunError: another live process is at work here, with whatever settings.
        """
        for _, sign in self._others():
            raise RunError(
                f"{self.path.parent.parent}: another job ({sign.owner}) is at work here too, and its files would be "
                "removed; wait for it or cancel it"
            )

    def check_settings(self, what: dict[str, Any]) -> None:
        """Refuse to begin where other settings are at work.

        Raises:
            RunError: an older claim has another digest.
        """
        mine, digest = json.loads(json.dumps(what)), self.path.name.partition("-")[0]
        for name, sign in self._others():
            since, theirs = sign.record.get("since"), sign.record.get("what")
            since = since if isinstance(since, int) else sign.stamp_ns
            theirs = theirs if isinstance(theirs, dict) else {}
            # At equal times neither is sure of having been seen by the other: both go.
            if name.partition("-")[0] == digest or since > self.since:
                continue
            key = next((key for key in sorted(theirs | mine) if theirs.get(key) != mine.get(key)), "digest")
            raise RunError(
                f"{self.path.parent.parent}: another job ({sign.owner}) is at work here with {key}="
                f"{theirs.get(key)!r}, now {mine.get(key)!r}; wait for it, cancel it, or use another --output or "
                "run.dir"
            )

    def _others(self) -> Iterator[tuple[str, Sign]]:
        """The other live claims, by file name; dead ones are removed."""
        if not self.path.exists():
            raise RunError(f"{self.path}: lost after too long without a sign of life; run the stage again")
        for path in sorted(self.path.parent.glob("[!.]*")):
            sign = None if path == self.path else read_sign(path)
            if sign is None:
                continue
            if self.leases.is_dead(path, sign):
                path.unlink(missing_ok=True)
            else:
                yield path.name, sign


@contextmanager
def claim(folder: Path, digest: str, what: dict[str, Any]) -> Iterator[Claim]:
    """Work on ``folder`` together with others of the same settings, and keep those of other settings out.

    A process first registers (a file in ``folder/.claims``, touched every few seconds), then looks round: of two with
    different digests the later one finds the earlier. A claim ends with its process, as a lock does.

    Args:
        folder: what is worked on; made where it is not there.
        digest: of settings and inputs; equal ones (ranks, tasks of an array) share the folder.
        what: settings and inputs by name, for the message.

    Raises:
        RunError: a live process with another digest was here first; names it and what differs.
    """
    owner = Owner.myself()
    path = folder / CLAIMS / f"{digest[:12]}-{owner.host}-{owner.pid}"
    leases = LeaseFolder(path.parent, owner, LOCK_STALE_SECONDS)
    path.unlink(missing_ok=True)  # of a dead process with this number
    try:
        # Digest and time are seen from the first moment on; the content takes the file's place as a whole.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        entry = Claim(path, path.stat().st_mtime_ns, leases)
        write_json(path, {**asdict(owner), "since": entry.since, "what": what})
        with touching(path, LOCK_STALE_SECONDS / BEATS_PER_TERM):
            entry.check_settings(what)
            yield entry
    finally:
        path.unlink(missing_ok=True)
        leases.close()
