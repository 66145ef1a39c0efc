"""Checks every byte of a split: tars against the manifest, headers, index, checksums and form of each sample."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.files import remedy_of, sha256_of
from trsr_dist.hashing import digest
from trsr_dist.log import progress
from trsr_dist.run import MANIFEST
from trsr_dist.shards.codec import decode_sample
from trsr_dist.shards.index import index_path, open_index, scan_tar, with_header
from trsr_dist.shards.inspect.findings import Findings
from trsr_dist.shards.lengths import is_measured, length_path
from trsr_dist.shards.manifest import read_split_manifest
from trsr_dist.shards.writer import candidate_digest


def verify_split(folder: Path, findings: Findings) -> int:
    """Report whatever differs from what was written; returns the bytes of the tars."""
    manifest = read_split_manifest(folder)
    shards = manifest["shards"]
    for facts in progress(shards, description=f"verify {folder.name}", unit=" shards"):
        for problem in verify_shard(folder / facts["name"], facts):
            findings.error(problem)
    for problem in (*_verify_lengths(folder, shards), *_verify_sums(folder, manifest)):
        findings.error(problem)
    return sum(facts["num_bytes"] for facts in shards)


def _verify_lengths(folder: Path, shards: list[dict]) -> Iterator[str]:
    """Token lengths, for whichever tokenizers they were measured."""
    for lengths in sorted(folder.glob("lengths-*")):
        for facts in shards:
            path = length_path(lengths, facts)
            if path.exists() and not is_measured(lengths, facts):
                yield f"{path}: damaged, or made from another tar; remove {lengths}, it is measured anew"


def _verify_sums(folder: Path, manifest: dict) -> Iterator[str]:
    shards = manifest["shards"]
    sums = {
        "num_samples": sum(facts["num_samples"] for facts in shards),
        "num_bytes": sum(facts["num_bytes"] for facts in shards),
        "candidate_hash": digest([facts["candidates"] for facts in shards]),
    }
    for name, value in sums.items():
        if manifest[name] != value:
            yield f"{folder / MANIFEST}: {name} is {manifest[name]!r}, its shards make {value!r}"


def verify_shard(path: Path, facts: dict) -> Iterator[str]:
    """What is wrong with one shard."""
    try:
        is_as_written = sha256_of(path) == facts["sha256"]
    except DataError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"{path}: {error.strerror}; {remedy_of(error, path, 'restore the shard or make the split again')}"
        return
    if not is_as_written:
        yield f"{path}: its bytes are not those that the manifest was written for; restore the shard"
    scanned = None
    try:
        scanned = scan_tar(path)
    except DataError as error:
        yield str(error)
    try:
        rows = open_index(path, facts["sha256"], facts["num_samples"])
    except DataError as error:
        yield str(error)
        return
    if is_as_written and scanned is not None and not _is_index_of(path, facts, scanned):
        yield f"{path}: the index differs from the tar; rebuild it with tools/inspect_shards.py --index"
        return
    yield from _verify_samples(path, rows, facts)


def _is_index_of(path: Path, facts: dict, scanned: np.ndarray) -> bool:
    return index_path(path).read_bytes() == with_header(facts["num_bytes"], facts["sha256"], scanned).tobytes()


def _verify_samples(path: Path, rows: np.ndarray, facts: dict) -> Iterator[str]:
    """Checksum and form of each sample, and the hash of all candidates."""
    candidates, num_bad = hashlib.sha256(), 0
    with open(path, "rb") as stream:
        for number, row in enumerate(rows):
            data = os.pread(stream.fileno(), int(row["num_bytes"]), int(row["offset"]))
            problem = None if zlib.crc32(data) == row["crc"] else "checksum differs, the bytes are damaged"
            if problem is None:
                try:
                    candidates.update(candidate_digest(decode_sample(data)).encode())
                except DataError as error:
                    problem = str(error)
            if problem is not None:
                num_bad += 1
                yield f"{path}: sample {number} (byte {row['offset']}): {problem}"
    if not num_bad and candidates.hexdigest() != facts["candidates"]:
        yield f"{path}: its candidates are not those of the manifest; make the split anew"
