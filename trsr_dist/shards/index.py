"""The index beside a tar: where each sample lies and its checksum. A tar from elsewhere can be indexed too.

``tarfile`` and webdataset take a broken header in mid-file for the end and drop the rest in silence. A scan here also
asks for the zero bytes that end a tar, so that no sample goes missing unnoticed.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, plain, sha256_of
from trsr_dist.hashing import hash64
from trsr_dist.printable import HALVES

ROW = np.dtype([("offset", "<u8"), ("key", "<u8"), ("num_bytes", "<u4"), ("crc", "<u4")])
"""Payload offset in the tar, hash of the member's key, payload bytes, CRC-32 of the payload."""
EXTENSION = ".json"
MAX_SAMPLE_BYTES = 1 << 28
"""Far more than any prompt needs; what a header promises beyond that is not read."""
BROKEN = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError)
"""What ``tarfile`` raises over headers that lie."""
BLANK = " \t\r\n\0"
END_BYTES = 1024
"""Zero bytes that every tar ends with."""
SMALL_BYTES = 1 << 19
KEPT_BYTES = 1 << 30
"""Of all files of a kind: the indexes of 40 million samples, the lengths of 10 million users with 21 candidates."""
MAPPED_FILES = 256
"""Mapped files of a kind that are kept open."""


def index_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.index")


def scan_tar(path: Path) -> np.ndarray:
    """Index rows of all samples of a tar, in its order.

    Members other than ``*.json`` are passed over: another reader may keep more beside a sample.

    Raises:
        DataError: truncated, a broken header, no end marker, a key twice, a sample that is a link or too large; names
            the byte.
    """
    rows, keys = [], set()
    with open(path, "rb", opener=plain) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    # Judged without the blank end: a damaged record of an extended header lets a name run on.
                    if member.isdir() or not member.name.rstrip(BLANK).endswith(EXTENSION):
                        continue
                    problem = _problem(member, keys, size)
                    if problem:
                        raise DataError(f"{path}: member {member.name!r} at byte {member.offset} {problem}")
                    key = member.name.removesuffix(EXTENSION)
                    keys.add(key)
                    payload = tar.extractfile(member).read()
                    rows.append((member.offset_data, hash64(key), len(payload), zlib.crc32(payload)))
                end = tar.offset
        except BROKEN as error:
            raise DataError(f"{path}: not a readable tar after {len(rows)} samples ({error}); restore it") from None
        _check_end(stream, path, end, len(rows))
    return np.array(rows, dtype=ROW)


def _problem(member: tarfile.TarInfo, keys: set[str], size: int) -> str:
    """Why a member cannot be read, found before it is; empty where it can.

    Args:
        member: of the tar.
        keys: of the members before it.
        size: of the tar, in bytes.
    """
    if not member.isfile() or member.issparse():
        kind = "has holes" if member.isfile() else "is a link or a device, not a file"
        return f"{kind}: the sample is lost; pack the files again with tar --dereference --hard-dereference"
    if not 0 <= member.size <= MAX_SAMPLE_BYTES:
        return f"has {member.size} bytes, where a sample has at most {MAX_SAMPLE_BYTES}; restore the tar"
    if member.offset_data + member.size > size:
        return f"has {size - member.offset_data} of {member.size} bytes: the tar is truncated; restore it"
    if HALVES.search(member.name):
        return "has a name that is not UTF-8; pack the files again"
    if not member.name.endswith(EXTENSION):
        return "has a name that runs on: the header is damaged; restore the tar"
    return "stands twice; pack the files again" if member.name.removesuffix(EXTENSION) in keys else ""


def _check_end(stream: BinaryIO, path: Path, end: int, num_samples: int) -> None:
    """What follows the last member must be zeros, two blocks at least."""
    stream.seek(end)
    length = 0
    while tail := stream.read(1 << 20):
        length += len(tail)
        if tail.strip(b"\0"):
            raise DataError(f"{path}: broken header at byte {end}, after {num_samples} samples; restore the file")
    if length < END_BYTES:
        raise DataError(f"{path}: no end marker at byte {end}, after {num_samples} samples: truncated; restore it")


def write_index(path: Path, rows: np.ndarray, sha256: str) -> None:
    """Write the index of the tar at ``path``; its first row says which tar it was made from."""
    with atomic_file(index_path(path), "wb") as stream:
        stream.write(with_header(path.stat().st_size, sha256, rows).tobytes())


def with_header(tar_bytes: int, sha256: str, rows: np.ndarray) -> np.ndarray:
    """All that an index holds. First row: size and part of the hash of the tar, number and CRC-32 of the other rows."""
    header = (tar_bytes, _sha_prefix(sha256), len(rows), zlib.crc32(rows.tobytes()))
    return np.concatenate([np.array([header], dtype=ROW), rows])


def build_index(path: Path) -> np.ndarray:
    """Scan a tar and write its index; the tar stays as it is."""
    rows = scan_tar(path)
    write_index(path, rows, sha256_of(path))
    return rows


def open_index(path: Path, sha256: str, num_samples: int) -> np.ndarray:
    """Index rows of the tar at ``path``.

    Raises:
        DataError: missing, damaged, or made from another tar than the one with this hash.
    """
    index = index_path(path)
    fix = "rebuild it with tools/inspect_shards.py --index"
    try:
        rows = open_array(index, ROW)
    except FileNotFoundError:
        raise DataError(f"{index}: missing; {fix}") from None
    except ValueError as error:
        raise DataError(f"{index}: not an index ({error}); {fix}") from None
    header, rows = rows[0], rows[1:]
    if header["key"] != _sha_prefix(sha256):
        raise DataError(f"{index}: made from another version of {path.name}; {fix}")
    if len(rows) != num_samples:
        raise DataError(f"{index}: {len(rows)} samples, the manifest says {num_samples}; {fix}")
    if header["crc"] != zlib.crc32(rows):
        raise DataError(f"{index}: damaged, its checksum differs; {fix}")
    if len(rows) and (rows["num_bytes"].max() > MAX_SAMPLE_BYTES or rows["offset"].max() > header["offset"]):
        raise DataError(f"{index}: names bytes that are not in {path.name}; {fix}")
    return rows


def _sha_prefix(sha256: str) -> int:
    return int(sha256[:16], 16)


def open_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file's values, read-only; a small file is read, since a mapping would hold one of the process's few files.

    Raises:
        FileNotFoundError: it is missing.
        DataError: it is no plain file.
        ValueError: it is empty, or its size is not that of whole values.
    """
    if path.stat().st_size > SMALL_BYTES:
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    with open(path, "rb", opener=plain) as stream:
        content = stream.read()
    if not content:
        raise ValueError("empty")
    return np.frombuffer(content, dtype=dtype)


class KeptArrays:
    """Arrays of numbered files, each opened once; above ``KEPT_BYTES`` the least recently used make room.

    A window of an epoch looks into hundreds of shards at random: what is not kept is opened again for each window.

    Args:
        open_one: from a number to its array.
    """

    def __init__(self, open_one: Callable[[int], np.ndarray]) -> None:
        self._open_one = open_one
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __call__(self, number: int) -> np.ndarray:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        array = self._kept[number] = self._open_one(number)
        self._bytes += _cost(array)
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= _cost(self._kept.popitem(last=False)[1])
        return array


def _cost(array: np.ndarray) -> int:
    return array.nbytes if array.nbytes <= SMALL_BYTES else KEPT_BYTES // MAPPED_FILES
