"""A split as its manifest and the indexes of its shards tell it. No tar is opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from trsr_dist.errors import ConfigError, DataError
from trsr_dist.hashing import digest
from trsr_dist.prompts.text import WORDING_VERSION
from trsr_dist.run import MANIFEST, Manifest, manifest_hash, read_manifest, write_manifest
from trsr_dist.shards.index import KeptArrays, open_index

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


class Split:
    """The samples of a split, numbered from 0 in the manifest's order.

    Args:
        folder: ``RUN/shards/{split}``.
        any_wording: take texts that were made with the prompts of another version too.

    Raises:
        RunError: there is no manifest.
        DataError: it names no shards, or they were made with the prompts of another version.
    """

    def __init__(self, folder: Path, any_wording: bool = False) -> None:
        self.folder = folder
        self.manifest_hash = manifest_hash(folder)
        self.manifest = read_split_manifest(folder)
        if not any_wording:
            self._check_wording()
        self.facts: list[dict] = self.manifest["shards"]
        self.starts = np.cumsum([0, *(facts["num_samples"] for facts in self.facts)])
        self.index = KeptArrays(self._open_index)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def candidate_hash(self) -> str:
        """Hash of users, candidates and labels of the split."""
        return self.manifest["candidate_hash"]

    def check_recent_items(self, num_shown: int) -> None:
        """Whether a prompt with the latest ``num_shown`` items, at most, leaves out none of a user's.

        Raises:
            ConfigError: the samples hold fewer; or they hold more, and no summary tells of those between.
        """
        settings = self.manifest["settings"]
        kept, scheme = settings.get("recent_items", num_shown), settings.get("scheme")
        if num_shown > kept or (num_shown < kept and scheme == "raw"):
            reason = "its users have no more" if num_shown > kept else "its older items end before those"
            raise ConfigError(
                f"{self.folder}: made with prompt.recent_items={kept}, and {reason}; the prompt shows {num_shown}; "
                f"set prompt.recent_items={kept}, or run launch/summarize.py with {num_shown}"
            )

    def sizes(self, start: int, stop: int) -> np.ndarray:
        """int64, shape (stop - start,): payload bytes of neighbouring samples, a measure of their cost."""
        parts = [self.index(shard)["num_bytes"][a:b] for shard, a, b in self.ranges(start, stop)]
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

    def keys(self, start: int, stop: int) -> np.ndarray:
        """uint64, shape (stop - start,): a hash of each sample's user."""
        parts = [self.index(shard)["key"][a:b] for shard, a, b in self.ranges(start, stop)]
        return np.concatenate([np.zeros(0, np.uint64), *parts])

    def locate(self, index: int) -> tuple[int, int]:
        """Shard number and the sample's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(self.starts.searchsorted(index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last + 1) of the pieces that make up samples ``start`` to ``stop - 1``."""
        while start < stop:
            shard, first = self.locate(start)
            end = min(stop, int(self.starts[shard + 1]))
            yield shard, first, first + end - start
            start = end

    def path(self, shard: int) -> Path:
        return self.folder / self.facts[shard]["name"]

    def _open_index(self, shard: int) -> np.ndarray:
        """The tar is not looked at."""
        facts = self.facts[shard]
        return open_index(self.path(shard), facts["sha256"], facts["num_samples"])

    def _check_wording(self) -> None:
        """Tars of another program tell nothing of it."""
        found = self.manifest["settings"].get("wording", WORDING_VERSION)
        if found != WORDING_VERSION:
            raise DataError(
                f"{self.folder}: its summaries were made with prompts of version {found}, now they are of version "
                f"{WORDING_VERSION}; make the shards again: launch/summarize.py with --force, or in another run.dir"
            )
