"""Small real splits for the tests of the shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.tokenizers import byte_level
from trsr_dist.hashing import random_stream
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import Candidate, Sample
from trsr_dist.shards.manifest import write_split_manifest
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.writer import write_shard

WORDS = ["storm", "final", "market", "tennis", "senate", "orbit", "garden", "river", "strike", "studio", "harbor"]


def make_sample(number: int, num_negatives: int = 6) -> Sample:
    """A user whose texts have lengths of their own; equal numbers give equal samples."""
    random = random_stream(number, "sample")

    def text(longest: int) -> str:
        return " ".join(random.choice(WORDS) for _ in range(random.randint(2, longest)))

    candidates = [Candidate(f"i{number}-{i}", f"title: {text(8)}", int(i == 0)) for i in range(num_negatives + 1)]
    random.shuffle(candidates)
    recent = tuple(f"title: {text(6)}" for _ in range(random.randint(1, 3)))
    provenance = {"history": [f"h{number}-{i}" for i in range(4)]}
    return Sample(f"user/{number}", "Would the user read it?", text(20), recent, tuple(candidates), provenance)


def write_split(
    folder: Path, samples: Sequence[Sample], sizes: Sequence[int], split: str = "train", **settings: object
) -> ShardSet:
    """A published split of shards of these sizes, made with these settings."""
    rest = list(samples)
    facts = []
    for number, size in enumerate(sizes):
        facts.append(write_shard(folder / f"{split}-{number:06d}.tar", rest[:size]))
        rest = rest[size:]
    assert not rest, "sizes must add up to the samples"
    write_split_manifest(folder, facts, settings, {}, split=split)
    return ShardSet(folder)


def make_split(folder: Path, sizes: Sequence[int] = (70, 5, 41, 84)) -> ShardSet:
    """A split of uneven shards."""
    return write_split(folder, [make_sample(number) for number in range(sum(sizes))], sizes)


def flip_byte(path: Path, place: int) -> None:
    """Damage a file as a bad disk does: its times stay."""
    status = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def make_builder(**settings: object) -> PromptBuilder:
    return PromptBuilder(byte_level(), **settings)
