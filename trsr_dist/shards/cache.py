"""A node's copies of shards: each fetched once for all ranks of the node, named by its content, limited in size.

Every copy is locked by its users (flock, which the kernel lifts when a process dies): shared by those who read it,
exclusively by the one who makes it. So a second rank waits for the first one's copy, and whatever nobody holds may go.
The bytes that all copies take up at most stand in the folder's lock file: a fetch among thousands of copies lists none.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trsr_dist.errors import ConfigError
from trsr_dist.log import get_logger
from trsr_dist.stores import parts_of

COPY, PARTIAL = ".tar", ".partial"
CHUNK_BYTES = 1 << 22
FULL = (errno.ENOSPC, errno.EDQUOT)
NOTE_DIGITS = 20
TURNS = 16
"""In which the copies of other sets make room, since all copies are looked at for each."""

log = get_logger("cache")


def open_cache(folder: str, gigabytes: float) -> ShardCache | None:
    """The node's copies as train.cache_dir and train.cache_gb say; None where there is no folder."""
    return ShardCache(Path(folder), round(gigabytes * 10**9)) if folder else None


class ShardCache:
    """Copies of shards on a node's own disk.

    A shard that finds no room is read where it lies. Copies of other sets make room, the least recently opened first;
    the sets in use never push out their own shards, which would have to come again in the next epoch.

    Args:
        folder: on the node's own disk; made where missing. Ranks, jobs and runs may share it.
        max_bytes: limit of all copies together.

    Raises:
        ConfigError: the folder cannot be written or locked.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._kept: set[str] = set()
        self._refused: set[str] = set()
        self._full_at: int | None = None
        """Bytes of the copies when this process found no room among them: nothing has changed while they are noted."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                pass
        except OSError as error:
            raise ConfigError(
                f"train.cache_dir={folder}: cannot be used ({error.strerror}); name a folder on the node's own disk"
            ) from None

    def keep(self, hashes: Iterable[str]) -> None:
        """Shards with these SHA-256 are in use: they do not make room for others of this process."""
        self._kept.update(hashes)

    def open(self, source: Path | str, sha256: str, num_bytes: int) -> int | None:
        """A descriptor of the copy, made first where missing; None: read the source.

        Args:
            source: the shard; a text is an address in a store.
            sha256: that it should have.
            num_bytes: its size.

        Raises:
            RunError: the store does not give it.
        """
        copy = self.folder / f"{sha256}{COPY}"
        while sha256 not in self._refused:
            with self._alone() as lock:
                descriptor = _open_locked(copy, fcntl.LOCK_SH)
                if descriptor is not None and os.fstat(descriptor).st_size == num_bytes:
                    with suppress(PermissionError):  # another user's copy
                        os.utime(descriptor)
                    return descriptor
                _remove(copy, descriptor)
                maker = _open_if_locked(copy.with_suffix(PARTIAL))
                if maker is None:
                    descriptor = self._reserve(lock, copy.with_suffix(PARTIAL), num_bytes)
            if maker is not None:
                fcntl.flock(maker, fcntl.LOCK_SH)  # until the copy is made, or its maker has died
                os.close(maker)
            elif descriptor is None or not _fetch(source, sha256, num_bytes, descriptor, copy):
                self._refused.add(sha256)
            else:
                return descriptor
        return None

    def drop(self, sha256: str) -> None:
        """Forget a copy that has turned out damaged."""
        self._refused.add(sha256)
        (self.folder / f"{sha256}{COPY}").unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Only one process of the node looks for copies and room at a time. Opened again, since a fork shares locks."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _reserve(self, lock: int, partial: Path, num_bytes: int) -> int | None:
        """A locked file of that size, which takes up its space at once; None: there is no room."""
        used, victims = _noted(lock), self._victims()
        if used is None or used + num_bytes > self.max_bytes:
            if used is not None and used == self._full_at:
                return None
            used = sum(status.st_size for status in self._files().values())
            room = max(num_bytes, self.max_bytes // TURNS) if used + num_bytes > self.max_bytes else 0
            while used + room > self.max_bytes and (freed := _remove_next(victims)):
                used -= freed
        descriptor = None
        if used + num_bytes <= self.max_bytes:
            descriptor = _allocate(partial, num_bytes, victims)
        else:
            self._full_at = used
            if not self._refused:
                log.info("%s: full with %d bytes; further shards are read where they lie", self.folder, used)
        _note(lock, used + num_bytes * (descriptor is not None))
        return descriptor

    def _victims(self) -> Iterator[Path]:
        """What may make room: leftovers of killed processes first, then other sets' copies, longest unopened first."""
        files = self._files()
        free = [path for path in files if path.suffix == PARTIAL or path.stem not in self._kept]
        yield from sorted(free, key=lambda path: (path.suffix == COPY, files[path].st_mtime_ns))

    def _files(self) -> dict[Path, os.stat_result]:
        """Copies, finished and not; those that vanish meanwhile do not count."""
        found = {}
        for path in self.folder.iterdir():
            if path.suffix in (COPY, PARTIAL):
                with suppress(FileNotFoundError):
                    found[path] = path.stat()
        return found


def _noted(lock: int) -> int | None:
    """Bytes of all copies, or more where some are gone; None where nobody has counted."""
    digits = os.pread(lock, NOTE_DIGITS, 0)
    return int(digits) if digits.isdigit() else None


def _note(lock: int, num_bytes: int) -> None:
    os.pwrite(lock, b"%0*d" % (NOTE_DIGITS, num_bytes), 0)


def _fetch(source: Path | str, sha256: str, num_bytes: int, descriptor: int, copy: Path) -> bool:
    """Fill the locked file and give it its name; False where that fails, which is logged."""
    partial, is_done = copy.with_suffix(PARTIAL), False
    try:
        if _copy_bytes(source, num_bytes, descriptor) == sha256:
            os.rename(partial, copy)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            is_done = True
        else:
            log.warning("%s: not copied to the node, its checksum differs from the manifest's", source)
    except OSError as error:
        log.warning("%s: not copied to the node (%s)", source, error.strerror)
    finally:
        if not is_done:
            partial.unlink(missing_ok=True)
            os.close(descriptor)
    return is_done


def _copy_bytes(source: Path | str, num_bytes: int, descriptor: int) -> str:
    """Write the source's bytes; returns their SHA-256."""
    found = hashlib.sha256()
    with os.fdopen(os.dup(descriptor), "wb") as target:
        for chunk in parts_of(source, num_bytes) if isinstance(source, str) else _chunks(source):
            found.update(chunk)
            target.write(chunk)
    return found.hexdigest()


def _chunks(source: Path) -> Iterator[bytes]:
    with open(source, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _allocate(partial: Path, num_bytes: int, victims: Iterator[Path]) -> int | None:
    """A locked file whose space is taken up; where the disk is full, victims go until it fits."""
    descriptor = None
    while True:
        try:
            if descriptor is None:
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, max(1, num_bytes))
            return descriptor
        except OSError as error:
            if error.errno not in FULL or not _remove_next(victims):
                log.warning("%s: no copy (%s); the shard is read where it lies", partial.parent, error.strerror)
                _remove(partial, descriptor)
                return None


def _remove_next(victims: Iterator[Path]) -> int:
    """Remove the next victim that nobody holds; returns its bytes, 0 where none is left."""
    for path in victims:
        descriptor = _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is not None:
            size = os.fstat(descriptor).st_size
            _remove(path, descriptor)
            if size:
                return size
    return 0


def _open_locked(path: Path, kind: int) -> int | None:
    """Open and lock; None where it is missing, or held by others and ``kind`` does not wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _open_if_locked(partial: Path) -> int | None:
    """Open a copy that a living process is making, or has made meanwhile; a dead one's is removed."""
    try:
        descriptor = os.open(partial, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return descriptor
    if not partial.exists():  # renamed and unlocked between the two calls above
        return descriptor
    _remove(partial, descriptor)
    return None


def _remove(path: Path, descriptor: int | None) -> None:
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)
