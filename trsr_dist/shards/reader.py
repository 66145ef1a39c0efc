"""Random access to the samples of a split: any sample by its number, checked against its checksum."""

from __future__ import annotations

import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.files import plain, remedy_of
from trsr_dist.log import get_logger
from trsr_dist.records import Sample
from trsr_dist.shards.cache import ShardCache
from trsr_dist.shards.codec import Outline, decode_outline, decode_sample
from trsr_dist.shards.index import index_path
from trsr_dist.shards.manifest import Split
from trsr_dist.stores import read_range

T = TypeVar("T")

OPEN_SHARDS = 4096
"""Tars that are kept open at most: file servers keep count of open files too."""
SHARE_OF_FILES = 4
"""Only this part of the files that a process may open: often it may have 1024."""

log = get_logger("shards")


class UnreadableError(DataError):
    """The system does not give a shard's bytes, which says nothing of them: it may at the next try."""


class OpenShard:
    """An open tar, or the node's copy of it, with its index.

    Args:
        path: of the tar; a text is its address in a store.
        facts: what the manifest says of it.
        rows: its index.
        cache: the node's copies.

    Raises:
        DataError: the tar is missing or has another size than the manifest says.
        RunError: a store does not give it.
    """

    def __init__(self, path: Path | str, facts: dict, rows: np.ndarray, cache: ShardCache | None = None) -> None:
        self.path = path
        self.rows = rows
        self._facts = facts
        self._cache = cache
        copy = cache.open(path, facts["sha256"], facts["num_bytes"]) if cache is not None else None
        self._is_copy = copy is not None
        self._descriptor = self._open_source() if copy is None else copy

    def read(self, number: int) -> bytes:
        """Payload of the shard's sample ``number``.

        Raises:
            DataError: unreadable, or the bytes are not those that were written.
        """
        try:
            return self._read(number)
        except DataError:
            if not self._is_copy:
                raise
            self._leave_copy()
            return self._read(number)

    def place(self, number: int) -> str:
        """Shard, member and byte, for error messages."""
        offset = int(self.rows[number]["offset"])
        header = self._bytes(100, offset - 512)
        name = header.split(b"\0")[0].decode("utf-8", "replace")
        return f"{self.path}: sample {number} (member {name!r}, byte {offset})"

    def advise(self, start: int, stop: int) -> None:
        """Ask the kernel to read samples ``start`` to ``stop - 1`` ahead."""
        first, last = self.rows[start], self.rows[stop - 1]
        length = int(last["offset"] + last["num_bytes"] - first["offset"])
        os.posix_fadvise(self._descriptor, int(first["offset"]), length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _bytes(self, size: int, offset: int) -> bytes:
        if self._descriptor is None:
            return read_range(self.path, offset, offset + size)
        return os.pread(self._descriptor, size, offset)

    def _read(self, number: int) -> bytes:
        row = self.rows[number]
        offset, size = int(row["offset"]), int(row["num_bytes"])
        try:
            data = self._bytes(size, offset)
        except OSError as error:
            raise UnreadableError(
                f"{self.path}: sample {number} (byte {offset}): {error.strerror}; try again, or restore the shard"
            ) from None
        if len(data) != size or zlib.crc32(data) != row["crc"]:
            raise DataError(f"{self.place(number)}: checksum differs, the bytes are damaged; restore the shard")
        return data

    def _leave_copy(self) -> None:
        log.warning("%s: the node's copy is damaged; reading the shard itself", self.path)
        source = self._open_source()
        self._cache.drop(self._facts["sha256"])
        self.close()
        self._descriptor, self._is_copy = source, False

    def _open_source(self) -> int | None:
        """None: in a store, where nothing is kept open."""
        if isinstance(self.path, str):
            return None
        try:
            descriptor = plain(self.path, os.O_RDONLY)
        except OSError as error:
            remedy = remedy_of(error, self.path, "restore the shard or make the split again")
            raise UnreadableError(f"{self.path}: {error.strerror}; {remedy}") from None
        size = os.fstat(descriptor).st_size
        if size != self._facts["num_bytes"]:
            os.close(descriptor)
            raise DataError(
                f"{self.path}: {size} bytes, the manifest says {self._facts['num_bytes']}: truncated or replaced; "
                "restore the shard or make the split again"
            )
        return descriptor


class ShardSet(Split):
    """The samples of a split.

    Args:
        folder: ``RUN/shards/{split}``.
        cache: the node's copies of shards; None: the shards are read where they lie.
        any_wording: read texts that were made with the prompts of another version too.
        url: where the tars are, in a store (``s3://bucket/run/shards/train``); manifest and indexes are in the folder.

    Raises:
        RunError: there is no manifest.
        DataError: a shard that the manifest names is missing, or it names none; or they were made with the prompts of
            another version.
    """

    def __init__(
        self, folder: str | Path, cache: ShardCache | None = None, any_wording: bool = False, url: str = ""
    ) -> None:
        super().__init__(Path(folder), any_wording)
        self._url = url.rstrip("/")
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._max_open = min(OPEN_SHARDS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE_OF_FILES)
        self._cache = cache
        if cache is not None:
            cache.keep(facts["sha256"] for facts in self.facts)
        self._check_present()

    def read(self, index: int, chosen: Sequence[int] | None = None) -> Sample:
        """A sample, with some of its candidates or all.

        Raises:
            DataError: names shard, member and byte.
        """
        return self._decoded(index, lambda data: decode_sample(data, chosen))

    def outline(self, index: int) -> Outline:
        """A sample without its texts; raises as ``read``, which has to have read it before."""
        return self._decoded(index, decode_outline)

    def _decoded(self, index: int, decode: Callable[[bytes], T]) -> T:
        shard, number = self.locate(index)
        opened = self.shard(shard)
        data = opened.read(number)
        try:
            return decode(data)
        except DataError as error:
            raise DataError(f"{opened.place(number)}: {error}; make the split again") from None

    def read_many(self, indices: Sequence[int]) -> list[Sample]:
        """Samples in the given order."""
        return [self.read(index) for index in indices]

    def advise(self, start: int, stop: int) -> None:
        """Ask the kernel to read neighbouring samples ahead; with copies on the node, or a store, there is no need."""
        if self._cache is not None or self._url:
            return
        for shard, first, last in self.ranges(start, stop):
            self.shard(shard).advise(first, last)

    def shard(self, shard: int) -> OpenShard:
        """An open shard; the least recently used ones are closed."""
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            facts = self.facts[shard]
            place = f"{self._url}/{facts['name']}" if self._url else self.path(shard)
            self._open[shard] = OpenShard(place, facts, self.index(shard), self._cache)
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].close()
        return self._open[shard]

    def opened_again(self) -> ShardSet:
        """The same samples for another process, without copies on the node unless they come from a store."""
        return ShardSet(self.folder, self._cache if self._url else None, any_wording=True, url=self._url)

    def close(self) -> None:
        for opened in self._open.values():
            opened.close()
        self._open.clear()

    def _check_present(self) -> None:
        present = {entry.name: entry.is_file() for entry in os.scandir(self.folder)}
        for facts in self.facts:
            tars = [] if self._url else [facts["name"]]
            for needed in (*tars, index_path(Path(facts["name"])).name):
                if needed not in present:
                    raise DataError(f"{self.folder / needed}: missing, the manifest names it; restore the split")
                if not present[needed]:
                    raise DataError(f"{self.folder / needed}: a pipe, device or folder; restore the split")
