"""Texts by the hash of all they depend on; shared by every task of every job on the run folder.

They are kept in journals, append-only files of checked records: whatever a kill leaves behind, complete records stay
and torn ones are skipped. A record is one line: CRC-32 of the JSON in 8 hex digits, a blank, the JSON, which begins
with the key. One writer a file, many readers.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from trsr_dist.errors import DataError
from trsr_dist.hashing import digest
from trsr_dist.json_text import parse_json
from trsr_dist.prompts.text import WORDING_VERSION, SummaryPrompt

SUFFIX = ".journal"
MAX_OPEN = 64
"""Journals kept open for reading: every start of every task leaves one, and a process may open 1024 files."""
MERGE_AT = 100_000
"""New entries join the sorted index at this number: 20 bytes an entry there, some 200 before."""
FRAME = 9
"""Bytes before the JSON."""
KEY = re.compile(rb'.{9}\{"key":"([0-9a-f]{32})"', re.DOTALL)
"""How a line begins."""
PIECE = 4096
"""Bytes of one read: most records are shorter."""
ENTRY = np.dtype([("key", "<u8"), ("file", "<u4"), ("offset", "<u8")])


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


def prompt_hash(prompt: SummaryPrompt) -> str:
    """Hash of a prompt's parts. The untrimmed prompt stands for the trimmed one."""
    return digest([WORDING_VERSION, prompt.instruction, prompt.previous, prompt.items])[:32]


class PlaceIndex:
    """Where each key's record lies: (file number, offset). A later record of a key takes the earlier one's place."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, ENTRY)
        self._new: dict[int, tuple[int, int]] = {}

    def find(self, key: str) -> tuple[int, int] | None:
        short = int(key[:16], 16)
        if short in self._new:
            return self._new[short]
        at = int(np.searchsorted(self._sorted["key"], np.uint64(short)))
        if at < len(self._sorted) and int(self._sorted["key"][at]) == short:
            return int(self._sorted["file"][at]), int(self._sorted["offset"][at])
        return None

    def add(self, key: str, file: int, offset: int) -> None:
        self._new[int(key[:16], 16)] = (file, offset)
        if len(self._new) < max(MERGE_AT, len(self._sorted) // 16):  # each merge copies all that is there
            return
        new = np.empty(len(self._new), ENTRY)
        new["key"] = np.fromiter(self._new, np.uint64, len(new))
        new["file"], new["offset"] = np.array(list(self._new.values()), np.int64).T
        both = np.concatenate([new, self._sorted])
        _, first = np.unique(both["key"], return_index=True)
        self._sorted, self._new = both[first], {}


class TextCache:
    """Look texts up, add new ones.

    Each task appends to its own journal, so that no lock is needed and a torn end is never written after. The
    journals of all tasks are read.

    Args:
        folder: ``RUN/summaries/journal``.
        task: name of this task among all that ever write to the folder.
    """

    def __init__(self, folder: Path, task: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_damaged = 0
        """Damaged records met; their texts are generated again."""
        self._own = folder / f"{task}{SUFFIX}"
        self._files: list[Path] = [self._own]
        self._scanned: dict[Path, int] = {}
        self._readers: dict[int, int] = {}
        self._index = PlaceIndex()
        self._writer: JournalWriter | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read what other tasks have added since the last time."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path == self._own:
                continue
            if path not in self._scanned:
                self._files.append(path)
                self._scanned[path] = 0
            if path.stat().st_size <= self._scanned[path]:
                continue
            number = self._files.index(path)
            for start, end, key in scan(path, self._scanned[path]):
                if key is None:
                    self.num_damaged += 1
                else:
                    self._index.add(key, number, start)
                self._scanned[path] = end

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, None where there is none."""
        place = self._index.find(key)
        if place is None:
            return None
        number, offset = place
        descriptor, line = self._reader(number), b""
        while b"\n" not in line and (more := os.pread(descriptor, PIECE, offset + len(line))):
            line += more
        record = unpack(line[: line.find(b"\n") + 1])
        self.num_damaged += record is None
        return record if record is not None and record["key"] == key else None

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record with a ``key``; once this returns, it survives the death of the process."""
        if self._writer is None:
            self._writer = JournalWriter(self._own)
        self._index.add(record["key"], 0, self._writer.append(record))

    def close(self) -> None:
        """Force new records to the disk and close all files."""
        for descriptor in self._readers.values():
            os.close(descriptor)
        self._readers.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _reader(self, number: int) -> int:
        """Descriptor of a journal; the one that was opened first makes room."""
        if number not in self._readers:
            if len(self._readers) >= MAX_OPEN:
                os.close(self._readers.pop(next(iter(self._readers))))
            self._readers[number] = os.open(self._files[number], os.O_RDONLY)
        return self._readers[number]
