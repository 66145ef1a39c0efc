"""Writes shards: a standard WebDataset tar and its index; the bytes depend on the samples alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, sha256_of
from trsr_dist.hashing import digest
from trsr_dist.records import Sample
from trsr_dist.run import write_manifest
from trsr_dist.shards.codec import encode_sample, member_key
from trsr_dist.shards.index import scan_tar, write_index


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What the manifest says of a shard."""

    name: str
    num_samples: int
    num_bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar."""
    candidates: str
    """Hash of users, candidate ids and labels: equal where only texts differ."""


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardFacts:
    """Write one tar with its index; it appears whole, under its name, or not at all.

    Raises:
        DataError: a user stands twice.
    """
    users, candidates = set(), hashlib.sha256()
    with atomic_file(path, "wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
        for sample in samples:
            if sample.user in users:
                raise DataError(f"{path}: user {sample.user!r} stands twice; users of a split must differ")
            users.add(sample.user)
            candidates.update(candidate_digest(sample).encode())
            tar.write({"__key__": member_key(sample.user), "json": encode_sample(sample)})
    sha256 = sha256_of(path)
    write_index(path, scan_tar(path), sha256)
    return ShardFacts(path.name, len(users), path.stat().st_size, sha256, candidates.hexdigest())


def candidate_digest(sample: Sample) -> str:
    """Hash of a user's candidate list."""
    return digest([sample.user, [[c.item, c.label] for c in sample.candidates]])


def write_split_manifest(
    folder: Path,
    shards: list[ShardFacts],
    settings: dict[str, Any],
    inputs: dict[str, str],
    stage: str = "summarize",
    **facts: Any,
) -> None:
    """Write the manifest that makes a folder of shards a split; call it last.

    Args:
        folder: holds the shards.
        shards: in the split's order.
        settings: the config that the bytes depend on.
        inputs: hashes of what was read.
        stage: that wrote the shards.
        **facts: counts and whatever else the stage wants to keep.
    """
    write_manifest(
        folder,
        stage,
        settings,
        inputs,
        **facts,
        num_samples=sum(shard.num_samples for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        candidate_hash=digest([shard.candidates for shard in shards]),
        shards=[asdict(shard) for shard in shards],
    )
