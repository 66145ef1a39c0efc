"""The index beside a tar: where each sample lies and its checksum. A tar from elsewhere can be indexed too.

``tarfile`` and webdataset take a broken header in mid-file for the end and drop the rest in silence. A scan here also
asks for the zero bytes that end a tar, so that no sample goes missing unnoticed.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, sha256_of
from trsr_dist.hashing import hash64
from trsr_dist.shards.arrays import open_array

ROW = np.dtype([("offset", "<u8"), ("key", "<u8"), ("num_bytes", "<u4"), ("crc", "<u4")])
"""Payload offset in the tar, hash of the member's key, payload bytes, CRC-32 of the payload."""
EXTENSION = ".json"
END_BYTES = 1024
"""Zero bytes that every tar ends with."""


def index_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.index")


def scan_tar(path: Path) -> np.ndarray:
    """Index rows of all samples of a tar, in its order.

    Members other than ``*.json`` are passed over: another reader may keep more beside a sample.

    Raises:
        DataError: truncated, a broken header, no end marker, a key twice; names the byte.
    """
    rows, keys = [], set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not member.name.endswith(EXTENSION):
                    continue
                key = member.name.removesuffix(EXTENSION)
                if key in keys:
                    raise DataError(f"{path}: member {member.name!r} stands twice, again at byte {member.offset}")
                keys.add(key)
                payload = _payload(tar, member, path)
                rows.append((member.offset_data, hash64(key), len(payload), zlib.crc32(payload)))
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a readable tar after {len(rows)} samples ({error}); restore it") from None
    _check_end(path, end, len(rows))
    return np.array(rows, dtype=ROW)


def _payload(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    payload = tar.extractfile(member).read()
    if len(payload) != member.size:
        raise DataError(
            f"{path}: member {member.name!r} at byte {member.offset_data} has {len(payload)} of {member.size} bytes: "
            "the tar is truncated; restore it"
        )
    return payload


def _check_end(path: Path, end: int, num_samples: int) -> None:
    """What follows the last member must be zeros, two blocks at least."""
    with open(path, "rb") as stream:
        stream.seek(end)
        tail = stream.read()
    if tail.strip(b"\0"):
        raise DataError(f"{path}: broken header at byte {end}, after {num_samples} samples; restore the file")
    if len(tail) < END_BYTES:
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
    return rows


def _sha_prefix(sha256: str) -> int:
    return int(sha256[:16], 16)
