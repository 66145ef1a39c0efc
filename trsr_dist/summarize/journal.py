"""Append-only files of checked records: whatever a kill leaves behind, complete records stay and torn ones are passed.

A record is one line: CRC-32 of the JSON in 8 hex digits, a blank, the JSON, which begins with the key. One writer a
file, many readers.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trsr_dist.errors import DataError
from trsr_dist.json_text import parse_json

FRAME = 9
"""Bytes before the JSON."""
KEY = re.compile(rb'.{9}\{"key":"([0-9a-f]{32})"', re.DOTALL)
"""How a line begins."""
PIECE = 4096
"""Bytes of one read: most records are shorter."""


class Record(TypedDict):
    """What every record has; the scheduler's have more."""

    __pydantic_config__ = {"extra": "allow"}
    key: str


def pack(record: dict[str, Any]) -> bytes:
    """A record, with a ``key`` of 32 hex digits, as a line."""
    body = json.dumps({"key": record["key"], **record}, ensure_ascii=False, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def unpack(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is torn or damaged."""
    body = line[FRAME:-1]
    if line[-1:] != b"\n" or line[:FRAME] != b"%08x " % zlib.crc32(body):
        return None
    try:
        return parse_json(body, Record)
    except DataError:
        return None


def scan(path: Path, offset: int = 0) -> Iterator[tuple[int, int, str | None]]:
    """Complete lines from ``offset`` on, as (start, end, key); None where a line begins with none.

    Whether the rest is undamaged shows when the record is read. An unfinished last line is not reported: its writer may
    be about to finish it.
    """
    with open(path, "rb") as stream:
        stream.seek(offset)
        for line in stream:
            if line[-1:] != b"\n":
                return
            found = KEY.match(line)
            yield offset, offset + len(line), found and found[1].decode()
            offset += len(line)


def read_at(descriptor: int, offset: int) -> dict[str, Any] | None:
    """The record at an offset; None where it is damaged."""
    line = b""
    while b"\n" not in line:
        more = os.pread(descriptor, PIECE, offset + len(line))
        if not more:
            return None
        line += more
    return unpack(line[: line.index(b"\n") + 1])


class JournalWriter:
    """Appends records, each by one write, so that a kill tears at most the last one.

    Args:
        path: a file that does not exist yet.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
        self.size = 0

    def append(self, record: dict[str, Any]) -> int:
        """Write a record and return its offset.

        Raises:
            OSError: the disk is full; the file is cut back to its complete records.
        """
        line = pack(record)
        offset = self.size
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, offset)
            raise
        self.size += len(line)
        return offset

    def close(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)
