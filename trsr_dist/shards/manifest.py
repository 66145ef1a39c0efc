"""What the manifest of a split holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from trsr_dist.errors import DataError
from trsr_dist.hashing import digest
from trsr_dist.run import MANIFEST, Manifest, manifest_hash, read_manifest, write_manifest

Count = Annotated[int, Field(ge=0, lt=2**53)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What the manifest says of a shard."""

    name: Annotated[str, Field(pattern=r"^[^/\x00]+$")]
    """A plain name in the manifest's folder."""
    num_samples: Count
    num_bytes: Count
    """Size of the tar."""
    sha256: Hash
    """Of the tar."""
    candidates: Hash
    """Hash of users, candidate ids and labels: equal where only texts differ."""


class SplitManifest(Manifest):
    """The manifest of a split, in the order of its samples."""

    num_samples: Count
    num_bytes: Count
    candidate_hash: Hash
    shards: list[ShardFacts]


def read_split_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a split, its shards as plain values.

    Raises:
        RunError: there is none.
        DataError: it is another stage's, damaged or of another form.
    """
    manifest_hash(folder)
    manifest = read_manifest(folder)
    if "shards" not in manifest:
        raise DataError(f"{folder / MANIFEST}: names no shards; give the folder of a split, RUN/shards/train")
    manifest = read_manifest(folder, SplitManifest)
    return manifest | {"shards": [asdict(facts) for facts in manifest["shards"]]}


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
