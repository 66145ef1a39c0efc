"""Files in any store that fsspec knows (s3://, gs://, hf://, https://), read with tries and time limits.

The one module that imports fsspec. Keys come from where a store's own client looks for them, never from a setting.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from trsr_dist.errors import DataError, RunError
from trsr_dist.log import get_logger
from trsr_dist.printable import in_one_line, strike_addresses

TRIES = 3
TRY_SECONDS = 10.0
"""Of one. All tries of a part take less than ``train.hang_seconds``, so that the error is heard first."""
PART_BYTES = 1 << 22
PAUSE_SECONDS = 1.0
"""Before the second try; each further pause is twice as long."""
TRY_AGAIN = (408, 429)
"""Of the statuses that blame the request: too slow, too often."""
FINAL = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError, ValueError)

Call = Callable[[fsspec.AbstractFileSystem, str], Any]
log = get_logger("stores")


def is_address(place: str) -> bool:
    """Whether a setting names a store and no path of this machine."""
    return "://" in place


def read_range(address: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop - 1`` of a file, fewer where it ends before.

    Raises:
        RunError: the store does not give them: what it says, and what to do.
    """
    return _tried(address, lambda store, path: store.cat_file(path, start=start, end=stop))


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder of a store; none where it lists nothing, as many web servers do.

    Raises:
        RunError: the store does not answer.
    """
    if folder.startswith(("http://", "https://")):
        return []
    entries = _tried(folder, lambda store, path: store.ls(path, detail=True))
    names = (entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file")
    return sorted(filter(None, names))


def facts_of(address: str) -> tuple[int, str]:
    """Bytes of a file, and what changes when it does: its tag or its time. Of a web server's file its size alone.

    Raises:
        RunError: the store does not answer, or has no such file.
    """
    size, version = _tried(address, lambda store, path: (store.size(path), str(store.ukey(path))))
    if size is None:
        raise RunError(f"{address}: the server does not tell its size; copy the file to a folder or to another store")
    return size, version


def parts_of(address: str, num_bytes: int) -> Iterator[bytes]:
    """A file of this size, from its begin to its end.

    Raises:
        DataError: it has another size.
        RunError: the store does not give it.
    """
    for start in range(0, num_bytes, PART_BYTES):
        wanted = min(PART_BYTES, num_bytes - start)
        part = read_range(address, start, start + wanted)
        if len(part) != wanted:
            raise DataError(
                f"{address}: {len(part)} bytes came from byte {start} on, expected {wanted}: truncated, replaced while "
                "it was read, or a server that ignores ranges; upload the file again"
            )
        yield part


def _tried(address: str, call: Call) -> Any:  # noqa: ANN401 (the call's)
    what = ""
    for number in range(TRIES):
        if number:
            log.warning("%s: %s; trying again", address, what)
            time.sleep(PAUSE_SECONDS * 2 ** (number - 1))
        try:
            # Looked up each time: after a fork a client of the parent is none.
            store, path = url_to_fs(address)
            return _within_time(lambda store=store, path=path: call(store, path))
        except Exception as error:  # the clients of the stores have errors of all kinds
            error = error.__cause__ or error  # what a client found, before fsspec called it a missing file
            status, what = _status(error), in_one_line(strike_addresses(f"{type(error).__name__}: {error}"), 300)
            if isinstance(error, FINAL) or (400 <= status < 500 and status not in TRY_AGAIN):
                raise RunError(f"{address}: {what}; {_remedy(error, status)}") from None
    raise RunError(
        f"{address}: {what}, {TRIES} times; check the network and the store, then run the command again: what is "
        "finished is kept"
    )


def _within_time(call: Callable[[], Any]) -> Any:  # noqa: ANN401 (the call's)
    """The call's value. No client can be interrupted: what takes too long is left to its thread."""
    done: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = done.get(timeout=TRY_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {TRY_SECONDS:g} s") from None
    if error is not None:
        raise error
    return value


def _status(error: BaseException) -> int:
    """Of HTTP; 0 where the error tells none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    found = getattr(error, "status", 0) or getattr(response, "status_code", 0) or getattr(error, "code", 0)
    return found if isinstance(found, int) else 0


def _remedy(error: BaseException, status: int) -> str:
    if isinstance(error, FileNotFoundError) or status == 404:
        return "correct the address, or upload the file again"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "get permission to read it, and give the store's client its key (AWS_PROFILE, HF_TOKEN and the like)"
    if isinstance(error, ImportError):
        return "install the store's package beside fsspec (s3fs, gcsfs, huggingface_hub, aiohttp)"
    return "correct the address"
