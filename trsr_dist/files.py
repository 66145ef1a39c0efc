"""The one place that writes files: outputs appear whole, under their final name, or not at all."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trsr_dist.errors import DataError, RunError
from trsr_dist.json_text import parse_json

MOVED = "old"
"""Kind of the temporary name of a folder that is being replaced."""
STALE_READS = 5
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """A stage writes here: a disk that is full or may not be written becomes an error that a user can mend.

    Args:
        folder: named where the system does not say which file it was.

    Raises:
        RunError: names the file, what the system found and the remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise RunError(
            f"{error.filename or folder}: {error.strerror}; make room or give leave to write, then run the stage "
            "again: what is finished is kept"
        ) from None


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of ``path`` for writing; renamed to ``path`` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """Fill a temporary folder; it takes the place of ``path`` when the block ends without an error.

    ``check`` runs last before that and may object by raising (a lock that was lost, see ``run.FolderLock``).

    An older folder of that name is moved aside first and removed last. Between the two renames a killed process leaves
    none of that name; ``recover_folder`` gives the older one its name back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process of the same number
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync_path(file)
        sync_path(temporary)
        if check is not None:
            check()
        _exchange(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    old = temporary_name(path, MOVED)
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo what a process left that was killed while it replaced ``path``. Call while holding the folder's lock."""
    for old in sorted(path.parent.glob(f".{glob.escape(path.name)}.{MOVED}-*")):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, path)


def temporary_name(path: Path, kind: str = "tmp") -> Path:
    """A hidden neighbour of ``path``; host and pid keep tasks on a shared file system apart."""
    return path.with_name(f".{path.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def plain(path: str | Path, flags: int) -> int:
    """An opener of plain files: a pipe would wait for a writer, and a device never ends.

    Raises:
        DataError: it is something else.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise DataError(f"{path}: {kind}, expected a plain file")
    return descriptor


def sync_path(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a rename survives a power cut."""
    sync_path(folder)


def read_text(path: Path) -> str:
    """Text of a small file that others replace or remove meanwhile.

    NFS answers that with a stale handle; looked up anew, the name leads to the new file or to none.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it is no plain file.
    """
    for _ in range(STALE_READS):
        try:
            os.close(plain(path, os.O_RDONLY))
            return path.read_text(encoding="utf-8")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    raise FileNotFoundError(errno.ENOENT, "replaced again and again while it was read", str(path))


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_file(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def read_json(path: str | Path, form: Any = dict[str, Any], finite: bool = True) -> Any:
    """Read JSON.

    Args:
        path: of the file.
        form: type of the value, see ``parse_json``.
        finite: refuse NaN and Infinity, which some models' configs hold.

    Raises:
        DataError: the file is missing, no plain file, not JSON or of another form.
    """
    path = Path(path)
    try:
        return parse_json(read_text(path), form, finite)
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {str(error).removeprefix(f'{path}: ')}; restore it, or write it again") from None


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb", opener=plain) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
