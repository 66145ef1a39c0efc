"""The one place that writes files: outputs appear whole, under their final name, or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

from trsr_dist.errors import DataError, RunError
from trsr_dist.json_text import parse_json
from trsr_dist.processes import is_abandoned, signature

MOVED = "old"
"""Kind of the temporary name of a folder that is being replaced."""
TEMPORARY = "tmp"
PARTIAL = "partial"
STALE_READS = 5
"""Times that NFS may name a file which another client has replaced."""
MAX_LINE_BYTES = 1 << 26
MAX_TEXT_BYTES = 1 << 28
"""Of a file that is read whole: configs, manifests, JSON."""
SILENT_SECONDS = 24 * 3600.0
"""What another host's process is writing is removed after so long without a write."""
SILENT_LOCKED_SECONDS = 120.0
"""Likewise where this process holds the lock of the place that it is written for."""
OF_THE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT,
)  # fmt: skip
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, then run the stage again: what is finished is kept"),
    errno.EROFS: "get permission to write there, or choose another run.dir or --output",
    errno.ENAMETOOLONG: "choose a shorter name (most file systems allow 255 bytes)",
    errno.ELOOP: "a link stands where a real file or folder is expected, or links lead in a circle; remove it",
    errno.EISDIR: "a folder stands where a file is expected; move it away",
    errno.ENOTEMPTY: "files stand where this stage writes; move them away",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
}

_swept: set[Path] = set()


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """A stage reads and writes here: what the disk refuses becomes an error that a user can act on.

    Args:
        folder: named where the system does not say which file it was.

    Raises:
        RunError: names the file, what the system found and the remedy.
    """
    try:
        yield
    except OSError as error:
        raise explain(error, folder) from None


def explain(error: OSError, path: str | Path = "") -> OSError | RunError:
    """The error for a user; the same one where neither it nor the caller can name a file.

    Args:
        error: of the system.
        path: named where the error names none, if the disk alone can have caused it.
    """
    named = isinstance(error.filename, str | bytes | Path)
    if not error.errno or not (named or path and error.errno in OF_THE_DISK):
        return error
    path = Path(os.fsdecode(error.filename if named else path))
    if hidden := re.fullmatch(rf"\.(.+)\.({TEMPORARY}|{MOVED})-[^/]*", path.name):
        path = path.with_name(hidden[1])
    return RunError(f"{path}: {error.strerror}; {_remedy(error.errno, path)}")


def remedy_of(error: OSError, path: Path, otherwise: str) -> str:
    """How to make a file readable, where permission is what is missing; otherwise what the caller knows."""
    return _remedy(error.errno, path) if isinstance(error, PermissionError) else otherwise


def _remedy(number: int, path: Path) -> str:
    for part in (path, *path.parents):
        if os.path.islink(part) and not os.path.exists(part):
            return f"{part} is a link to {os.readlink(part)}, which is missing; restore that or remove the link"
        if number in (errno.ENOTDIR, errno.EEXIST) and os.path.exists(part) and not os.path.isdir(part):
            return f"{part} is a file where a folder is expected; choose another path or move it away"
    if number in (errno.EACCES, errno.EPERM):
        # Root may read all and still be refused by the server or by a file's attributes.
        if not os.path.lexists(path) and not os.access(path.parent, os.X_OK, effective_ids=True):
            return f"get permission to enter {path.parent} (its owner: chmod +x)"
        if os.path.lexists(path) and not os.access(path, os.R_OK, effective_ids=True):
            return f"get permission to read it (its owner: chmod +r {path}; a folder also needs +x)"
        return f"get permission to write in {path.parent}, or choose another run.dir or --output"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return "no such file or folder, or it was removed meanwhile; check the path"
    return REMEDIES.get(number, "check the path and the disk that it is on, then run the command again")


@contextmanager
def atomic_file(path: str | Path, mode: str = "w", durable: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary neighbour of ``path`` for writing; renamed to ``path`` when the block ends without an error.

    Args:
        path: takes the content as a whole.
        mode: as ``open``'s.
        durable: survive a power cut; not needed for what is rewritten every few seconds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:
        _swept.add(path.parent)
        sweep(path.parent)
    temporary = temporary_name(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8", opener=_new) as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if durable:
            sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def resumable_file(path: str | Path, content: str) -> Iterator[tuple[IO[str], int]]:
    """Append lines to a hidden neighbour of ``path``, which takes its name when the block ends without an error.

    After an error it stays, and the next process that writes the same content goes on behind its last whole line.

    Args:
        path: takes the content as a whole.
        content: hash of all that decides the lines.

    Yields:
        The stream, and the number of lines that are there already.

    Raises:
        RunError: another process is writing the same.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{PARTIAL}-{content[:16]}")
    with open(partial, "a+b", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(stream.fileno()), os.stat(partial)):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):  # the latter where it has just been finished
            raise RunError(f"{partial}: another process is writing it; wait for it, or choose another output") from None
        except OSError as error:
            raise RunError(f"{partial}: the disk locks no files ({error.strerror}); choose another output") from None
        stream.seek(0)
        num_lines, size = 0, 0
        for line in stream:
            if line.endswith(b"\n"):
                num_lines, size = num_lines + 1, size + len(line)
        stream.truncate(size)
        with io.TextIOWrapper(stream, encoding="utf-8", line_buffering=True) as text:
            yield text, num_lines
            text.flush()
            os.fsync(stream.fileno())
            os.replace(partial, path)
    sync_path(path.parent)


def _new(name: str, flags: int) -> int:
    """Never a file or link that somebody has put there."""
    return os.open(name, flags | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def sweep(folder: Path, silent_seconds: float = SILENT_SECONDS) -> None:
    """Remove the temporary files and folders that dead processes have left in a folder."""
    for left in folder.glob(f".*.{TEMPORARY}-*"):
        with suppress(OSError):
            if is_abandoned(left, silent_seconds):
                _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, check: Callable[[], None] | None = None, replace: bool = True) -> Iterator[Path]:
    """Fill a temporary folder; it takes the place of ``path`` when the block ends without an error.

    ``check`` runs last before that and may object by raising (a lock that was lost, see ``locks.FolderLock``). Without
    ``replace`` a folder that another process has put there meanwhile stays.

    An older folder of that name is moved aside first and removed last. Between the two renames a killed process leaves
    none of that name; ``recover_folder`` gives the older one its name back.

    Raises:
        RunError: a file has that name.
    """
    path = real_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: a file where a folder is expected; choose another path or move it away")
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in (*temporary.rglob("*"), temporary):
            found = file.lstat().st_mode
            if stat.S_ISREG(found) and mode & ~found:  # some libraries write files that only their owner may read
                file.chmod(found | mode)
            sync_path(file)
        if check is not None:
            check()
        if replace:
            replace_folder(temporary, path)
        else:
            is_first(lambda: os.rename(temporary, path))
            sync_path(path.parent)
    except OSError:
        if check is not None:
            check()  # who has lost the lock may find the files gone, too
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_first(rename: Callable[[], None]) -> bool:
    """Whether the new name was free; a folder that others have put there stays."""
    try:
        rename()
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def replace_folder(new: Path, path: Path) -> None:
    """Give ``new`` the name ``path``; an older folder is moved aside first, and removed last.

    Raises:
        OSError: another process was faster, or the disk refuses; an older folder has its name back.
    """
    old = temporary_name(path, MOVED)
    if path.exists():
        os.utime(path)  # its stamp tells others how long ago it was moved
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
    sync_path(path.parent)


def recover_folder(path: Path, dead: str = "", locked: bool = True) -> None:
    """Undo what killed processes left that were replacing ``path``, and nothing of those that live.

    The folder that was moved aside last gets its name back where there is none; half-written ones are removed.

    Args:
        path: the folder.
        dead: signature of a process that is known to be.
        locked: this process holds the folder's lock, so that nobody else may be replacing it.
    """
    path = real_folder(path)
    is_dead = partial(is_abandoned, silent_seconds=SILENT_LOCKED_SECONDS, dead=dead)
    moved, begun = (list(path.parent.glob(f".{glob.escape(path.name)}.{kind}-*")) for kind in (MOVED, TEMPORARY))
    for old in sorted(moved, key=lambda old: old.lstat().st_mtime_ns, reverse=True):
        if not path.exists() and (locked or is_dead(old)):
            os.rename(old, path)
    for left in filter(is_dead, [*filter(os.path.lexists, moved), *begun]):
        _remove(left)


def remove_folder(path: Path) -> None:
    """Remove a folder; at no moment is there half of it under its name."""
    gone = temporary_name(path)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def real_folder(path: str | Path) -> Path:
    """What a link leads to: the folder there is replaced, not the link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def temporary_name(path: Path, kind: str = TEMPORARY) -> Path:
    """A hidden neighbour of ``path`` that nobody can foresee; it says which process is at work."""
    return path.with_name(f".{path.name}.{kind}-{signature()}-{secrets.token_hex(8)}")


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
    """Force a file's content to the disk, or a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """Text of a small file that others replace or remove meanwhile.

    NFS answers that with a stale handle; looked up again, the name leads to the new file or to none.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it is no plain file, or far larger than any of its kind.
    """
    for _ in range(STALE_READS):
        try:
            os.close(plain(path, os.O_RDONLY))
            if (size := path.stat().st_size) > MAX_TEXT_BYTES:
                raise DataError(f"{path}: {size:,} bytes, expected at most {MAX_TEXT_BYTES:,}; name the right file")
            return path.read_text(encoding="utf-8")
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    raise FileNotFoundError(errno.ENOENT, "replaced again and again while it was read", str(path))


def write_json(path: str | Path, value: Any, durable: bool = True) -> None:
    """Write indented JSON atomically; see ``atomic_file``."""
    with atomic_file(path, durable=durable) as stream:
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


def numbered_lines(stream: BinaryIO, path: Path, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Line numbers from ``first`` and lines, with their ends, of what is opened for reading bytes.

    Raises:
        DataError: a line has more than ``MAX_LINE_BYTES``: a file without line ends would fill the memory.
    """
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), first):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path}:{number}: more than {MAX_LINE_BYTES >> 20} MB without a line end; restore it")
        yield number, line


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb", opener=plain) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
