"""Indexes for tars that lack one, and a manifest where tars came from elsewhere; the tars stay as they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from trsr_dist.errors import DataError
from trsr_dist.files import sha256_of
from trsr_dist.log import get_logger, progress
from trsr_dist.run import MANIFEST
from trsr_dist.shards.codec import decode_sample
from trsr_dist.shards.index import build_index, open_index
from trsr_dist.shards.manifest import ShardFacts, read_split_manifest, write_split_manifest
from trsr_dist.shards.writer import candidate_digest

log = get_logger("inspect")


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
            _check_is_manifests(path, facts)
            build_index(path)
            num_built += 1
    log.info("%s: built %d indexes that were missing or damaged", folder, num_built)


def _check_is_manifests(path: Path, facts: dict) -> None:
    if not path.is_file() or sha256_of(path) != facts["sha256"]:
        raise DataError(
            f"{path}: missing, or not the tar that the manifest was written for; restore it, or remove {MANIFEST} to "
            "take the tars as they are"
        )


def adopt_tar(path: Path) -> ShardFacts:
    """Index a tar and return what a manifest says of it.

    Raises:
        DataError: it is damaged, or a member is no sample; names the byte.
    """
    rows = build_index(path)
    if not len(rows):
        raise DataError(f"{path}: no *.json member; expected one for each user")
    candidates = hashlib.sha256()
    with open(path, "rb") as stream:
        for number, row in enumerate(rows):
            data = os.pread(stream.fileno(), int(row["num_bytes"]), int(row["offset"]))
            try:
                candidates.update(candidate_digest(decode_sample(data)).encode())
            except DataError as error:
                raise DataError(f"{path}: sample {number} (byte {row['offset']}): {error}; repair the tar") from None
    return ShardFacts(path.name, len(rows), path.stat().st_size, sha256_of(path), candidates.hexdigest())
