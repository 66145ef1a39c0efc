"""Every byte of a split: tars, manifest, indexes, lengths and tables. Builds what foreign tars lack."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError, TrsrError
from trsr_dist.files import remedy_of, sha256_of
from trsr_dist.hashing import digest
from trsr_dist.log import get_logger, progress
from trsr_dist.run import MANIFEST, manifest_hash
from trsr_dist.shards.codec import decode_sample
from trsr_dist.shards.index import build_index, index_path, open_index, scan_tar, with_header
from trsr_dist.shards.lengths import is_measured, length_path
from trsr_dist.shards.manifest import ShardFacts, read_split_manifest, write_split_manifest
from trsr_dist.shards.tables import MINED, SCORES, open_table
from trsr_dist.shards.writer import candidate_digest

log = get_logger("inspect")


def verify_split(folder: Path) -> tuple[list[str], int]:
    """Whatever differs from what was written, and the bytes of the tars."""
    manifest = read_split_manifest(folder)
    shards, problems = manifest["shards"], []
    for facts in progress(shards, description=f"verify {folder.name}", unit=" shards"):
        problems += verify_shard(folder / facts["name"], facts)
    for lengths in sorted(folder.glob("lengths-*")):  # for whichever tokenizers they were measured
        for facts in shards:
            path = length_path(lengths, facts)
            if path.exists() and not is_measured(lengths, facts):
                problems.append(f"{path}: damaged, or made from another tar; remove {lengths}, it is measured again")
    problems += _verify_tables(folder)
    num_bytes = sum(facts["num_bytes"] for facts in shards)
    sums = {
        "num_samples": sum(facts["num_samples"] for facts in shards),
        "num_bytes": num_bytes,
        "candidate_hash": digest([facts["candidates"] for facts in shards]),
    }
    for name, value in sums.items():
        if manifest[name] != value:
            problems.append(f"{folder / MANIFEST}: {name} is {manifest[name]!r}, its shards make {value!r}")
    return problems, num_bytes


def _verify_tables(folder: Path) -> Iterator[str]:
    """What is wrong with the complete tables beside the shards: an incomplete one is still being made."""
    tables = dict.fromkeys(sorted(folder.glob(f"{SCORES}-*")), "run tools/score_shards.py")
    for table, remedy in (tables | {folder / MINED: "run tools/mine_negatives.py"}).items():
        if (table / MANIFEST).is_file():
            try:
                open_table(table, manifest_hash(folder), remedy)
            except TrsrError as error:
                yield str(error)


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
    if is_as_written and scanned is not None:
        expected = with_header(facts["num_bytes"], facts["sha256"], scanned).tobytes()
        if index_path(path).read_bytes() != expected:
            yield f"{path}: the index differs from the tar; rebuild it with tools/inspect_shards.py --index"
            return
    yield from _verify_samples(path, rows, facts)


def _verify_samples(path: Path, rows: np.ndarray, facts: dict) -> Iterator[str]:
    """Checksum and form of each sample, and the hash of all candidates."""
    candidates, num_bad = hashlib.sha256(), 0
    for place, crc, data in _payloads(path, rows):
        problem = None if zlib.crc32(data) == crc else "checksum differs, the bytes are damaged"
        if problem is None:
            try:
                candidates.update(candidate_digest(decode_sample(data)).encode())
            except DataError as error:
                problem = str(error)
        if problem is not None:
            num_bad += 1
            yield f"{place}: {problem}"
    if not num_bad and candidates.hexdigest() != facts["candidates"]:
        yield f"{path}: its candidates are not those of the manifest; make the split again"


def _payloads(path: Path, rows: np.ndarray) -> Iterator[tuple[str, int, bytes]]:
    """Where each sample stands, in words, its checksum by the index, and its bytes."""
    with open(path, "rb") as stream:
        for number, row in enumerate(rows):
            data = os.pread(stream.fileno(), int(row["num_bytes"]), int(row["offset"]))
            yield f"{path}: sample {number} (byte {row['offset']})", int(row["crc"]), data


def index_split(folder: Path) -> None:
    """Build what is missing: indexes, and the manifest.

    Raises:
        DataError: a tar is damaged or holds other things than samples, or is not the manifest's.
    """
    if (folder / MANIFEST).is_file():
        _repair_indexes(folder)
        return
    tars = sorted(folder.glob("*.tar"))
    facts = [adopt_tar(path) for path in progress(tars, description=f"index {folder.name}", unit=" shards")]
    write_split_manifest(folder, facts, {}, {}, stage="index", split=folder.name)
    log.info("%s: indexed %d tars with %d samples", folder, len(facts), sum(shard.num_samples for shard in facts))


def _repair_indexes(folder: Path) -> None:
    num_built = 0
    for facts in read_split_manifest(folder)["shards"]:
        path = folder / facts["name"]
        try:
            open_index(path, facts["sha256"], facts["num_samples"])
        except DataError:
            if not path.is_file() or sha256_of(path) != facts["sha256"]:
                raise DataError(
                    f"{path}: missing, or not the tar that the manifest was written for; restore it, or remove "
                    f"{MANIFEST} to take the tars as they are"
                ) from None
            build_index(path)
            num_built += 1
    log.info("%s: built %d indexes that were missing or damaged", folder, num_built)


def adopt_tar(path: Path) -> ShardFacts:
    """Index a tar and return what a manifest says of it.

    Raises:
        DataError: it is damaged, or a member is no sample; names the byte.
    """
    rows = build_index(path)
    if not len(rows):
        raise DataError(f"{path}: no *.json member; expected one for each user")
    candidates = hashlib.sha256()
    for place, _, data in _payloads(path, rows):
        try:
            candidates.update(candidate_digest(decode_sample(data)).encode())
        except DataError as error:
            raise DataError(f"{place}: {error}; repair the tar") from None
    return ShardFacts(path.name, len(rows), path.stat().st_size, sha256_of(path), candidates.hexdigest())
