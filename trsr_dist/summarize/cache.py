"""Texts by the hash of all they depend on; shared by every task of every job on the run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from trsr_dist.hashing import digest
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.prompts.wording import WORDING_VERSION
from trsr_dist.summarize.journal import JournalWriter, read_at, scan

SUFFIX = ".journal"
MAX_OPEN = 64
"""Journals kept open for reading: every start of every task leaves one, and a process may open 1024 files."""
MERGE_AT = 100_000
"""New entries join the sorted index at this number: 20 bytes an entry there, some 200 before."""
ENTRY = np.dtype([("key", "<u8"), ("file", "<u4"), ("offset", "<u8")])


def prompt_hash(prompt: SummaryPrompt) -> str:
    """Hash of a prompt's parts. The untrimmed prompt stands for the trimmed one."""
    return digest([WORDING_VERSION, prompt.instruction, prompt.previous, prompt.items])[:32]


def text_key(identity: dict[str, Any], prompt: str) -> str:
    """Key of a text: engine, model, decoding, seed and the prompt's hash."""
    return digest([identity, prompt])[:32]


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
        if len(self._new) >= max(MERGE_AT, len(self._sorted) // 16):  # each merge copies all that is there
            self._merge()

    def _merge(self) -> None:
        new = np.empty(len(self._new), ENTRY)
        new["key"] = np.fromiter(self._new, np.uint64, len(new))
        new["file"], new["offset"] = np.array(list(self._new.values()), np.int64).T
        both = np.concatenate([new, self._sorted])
        _, first = np.unique(both["key"], return_index=True)
        self._sorted, self._new = both[first], {}


class TextCache:
    """Look texts up, add new ones.

    Each task appends to a journal of its own, so that no lock is needed and a torn end is never written after. The
    journals of all tasks are read.

    Args:
        folder: ``RUN/summaries/journal``.
        task: name of this task among all that ever write to the folder.
    """

    def __init__(self, folder: Path, task: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_damaged = 0
        """Damaged records met; their texts are made again."""
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
            if path.stat().st_size > self._scanned[path]:
                self._scan(path)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, None where there is none."""
        place = self._index.find(key)
        if place is None:
            return None
        number, offset = place
        record = read_at(self._reader(number), offset)
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

    def _scan(self, path: Path) -> None:
        number = self._files.index(path)
        for start, end, key in scan(path, self._scanned[path]):
            if key is None:
                self.num_damaged += 1
            else:
                self._index.add(key, number, start)
            self._scanned[path] = end
