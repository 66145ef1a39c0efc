"""Writes shards: a standard WebDataset tar and its index; the bytes depend on the samples alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from webdataset import TarWriter

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, sha256_of
from trsr_dist.hashing import digest
from trsr_dist.records import Sample
from trsr_dist.shards.codec import encode_sample, member_key
from trsr_dist.shards.index import scan_tar, write_index
from trsr_dist.shards.manifest import ShardFacts


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
