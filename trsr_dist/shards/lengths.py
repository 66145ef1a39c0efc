"""Token lengths of every prompt of a split under one tokenizer and prompt style, beside the shards.

With them an epoch is planned without reading or tokenizing a sample, so every rank plans the same rows by itself. The
folder is named by ``PromptBuilder.fingerprint``; the tars are never touched.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, read_json
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.shards.index import KeptArrays, open_array
from trsr_dist.shards.manifest import Split

TRIMS = ("recent_dropped", "summary_words_cut", "item_words_cut", "candidates_capped", "recent_capped")
TRIMS_FOR_ALL = TRIMS[:3]
"""These depend on all of a user's candidates; the cap on an item depends on that item alone."""
SUMMARY = "summary.json"
NUM_HEADER = 5 + len(TRIMS)
"""int32s before a file's table: CRC-32 of all that follows, samples, part of the tar's hash, damaged samples, tokens of
the head, users with each kind of trim."""
INT32 = np.dtype("<i4")
LONGEST_PAUSE_SECONDS = 5.0
STALL_SECONDS = 3600.0
"""Waiting for the other ranks ends after so long without a new file."""


@dataclass(frozen=True, slots=True)
class Header:
    """Counts of one shard."""

    num_damaged: int
    head_tokens: int
    """Tokens that all of the shard's prefixes have in common with the split's first."""
    trimmed_users: dict[str, int]


@dataclass(frozen=True, slots=True)
class LengthFacts:
    """Sums over a split."""

    shards: str
    """Manifest hash of the split."""
    num_samples: int
    num_candidates: int
    prefix_tokens: int
    suffix_tokens: int
    longest_prompt: int
    """Tokens of the longest prefix with one suffix."""
    longest_unit: int
    """Tokens of the longest prefix with all its suffixes."""
    head_tokens: int
    """Tokens that all prefixes begin with (the instruction); each has at least one more."""
    trimmed_users: dict[str, int] = field(default_factory=dict)
    num_damaged: int = 0
    damaged: tuple[str, ...] = ()
    """The shards that hold damaged samples."""


@dataclass(frozen=True, slots=True)
class Table:
    """Lengths of some samples."""

    samples: np.ndarray
    """int64, shape (num_samples,): their numbers in the split."""
    prefixes: np.ndarray
    """int64, shape (num_samples,)."""
    trimmed: np.ndarray
    """bool, shape (num_samples,): parts common to all candidates were cut."""
    starts: np.ndarray
    """int64, shape (num_samples + 1,): where each sample's candidates begin."""
    suffixes: np.ndarray
    """int64, shape (num_candidates,)."""
    labels: np.ndarray
    """bool, shape (num_candidates,)."""

    @property
    def owner(self) -> np.ndarray:
        """int64, shape (num_candidates,): the sample of each candidate, counted within the table."""
        return np.repeat(np.arange(len(self.samples)), np.diff(self.starts))

    def unit_tokens(self) -> np.ndarray:
        """int64, shape (num_samples,): prefix and all suffixes."""
        sums = np.bincount(self.owner, weights=self.suffixes, minlength=len(self.samples))
        return self.prefixes + sums.astype(np.int64)


def lengths_folder(shards: Split, builder: PromptBuilder) -> Path:
    """Where the lengths of a split lie for this tokenizer and prompt style."""
    return shards.folder / f"lengths-{builder.fingerprint}"


class Lengths:
    """Measured lengths of a split.

    Args:
        shards: of the split.
        folder: what ``measure_lengths`` filled.
    """

    def __init__(self, shards: Split, folder: Path) -> None:
        self.shards = shards
        self.folder = folder
        self._array = KeptArrays(lambda shard: open_lengths(folder, shards.facts[shard]))

    @cached_property
    def facts(self) -> LengthFacts:
        """Sums over the split."""
        return read_json(self.folder / SUMMARY, LengthFacts)

    def header(self, shard: int) -> Header:
        """Counts of a shard."""
        damaged, head, *trims = self._array(shard)[3:NUM_HEADER].tolist()
        return Header(damaged, head, dict(zip(TRIMS, trims, strict=True)))

    def table(self, runs: Sequence[tuple[int, int]]) -> Table:
        """Lengths of the samples of some (start, stop) runs, in their order."""
        parts = list(self._parts(runs))
        values = _joined([values for values, _ in parts])
        counts = _joined([counts for _, counts in parts])
        heads = np.cumsum(counts) - counts
        is_suffix = np.ones(len(values), dtype=bool)
        is_suffix[heads] = False
        prefixes, suffixes = values[heads], values[is_suffix]
        return Table(
            samples=_joined([np.arange(start, stop) for start, stop in runs]),
            prefixes=prefixes >> 1,
            trimmed=(prefixes & 1).astype(bool),
            starts=np.concatenate([[0], np.cumsum(counts - 1)]),
            suffixes=suffixes >> 1,
            labels=(suffixes & 1).astype(bool),
        )

    def _parts(self, runs: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, stop in runs:
            for shard, first, last in self.shards.ranges(start, stop):
                array = self._array(shard)
                border = NUM_HEADER + int(array[1]) + 1  # between starts and values, see ``write_lengths``
                starts, values = array[NUM_HEADER:border], array[border:]
                yield values[starts[first] : starts[last]], np.diff(starts[first : last + 1])


def wait_for(folder: Path, done: Callable[[], bool]) -> None:
    """Look again and again, ever less often: many ranks wait on one file system.

    Raises:
        DataError: nothing has come into the folder for long.
    """
    last_count, last_change, pause = -1, time.monotonic(), 0.05
    while not done():
        count = len(list(folder.iterdir()))
        if count != last_count:
            last_count, last_change = count, time.monotonic()
        elif time.monotonic() - last_change > STALL_SECONDS:
            raise DataError(f"{folder}: no new file for {STALL_SECONDS:.0f} s; see what another rank says")
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)


def length_path(folder: Path, facts: dict) -> Path:
    return folder / f"{facts['name']}.lengths"


def write_lengths(folder: Path, facts: dict, header: Header, starts: Sequence[int], values: Sequence[int]) -> None:
    """Write a shard's file.

    Args:
        folder: of the split's lengths.
        facts: what the manifest says of the shard.
        header: counts.
        starts: where each sample's values begin, and where the last one's end.
        values: of each sample ``prefix << 1 | trimmed``, then ``suffix << 1 | label`` of each candidate; of a damaged
            sample 0.
    """
    trims = (header.trimmed_users[name] for name in TRIMS)
    counts = [facts["num_samples"], sha_part(facts), header.num_damaged, header.head_tokens, *trims]
    content = np.array([*counts, *starts, *values], dtype=INT32).tobytes()
    with atomic_file(length_path(folder, facts), "wb") as stream:
        stream.write(zlib.crc32(content).to_bytes(4, "little") + content)


def open_lengths(folder: Path, facts: dict) -> np.ndarray:
    """A shard's file, see ``write_lengths``.

    Raises:
        DataError: missing, damaged, or made from another version of the tar.
    """
    path = length_path(folder, facts)
    try:
        array = open_array(path, INT32)
    except (FileNotFoundError, ValueError) as error:
        problem = "missing" if isinstance(error, FileNotFoundError) else f"no file of lengths ({error})"
    else:
        is_whole = len(array) > NUM_HEADER and array[:1].view("<u4")[0] == zlib.crc32(array[1:])
        if is_whole and array[1:3].tolist() == [facts["num_samples"], sha_part(facts)]:
            return array
        problem = "made from another tar" if is_whole else "damaged, its checksum differs"
    raise DataError(f"{path}: {problem}; remove {folder}, and the lengths are measured again")


def is_measured(folder: Path, facts: dict) -> bool:
    """Whether a shard's file is there, undamaged, and made from this version of the tar."""
    try:
        open_lengths(folder, facts)
    except DataError:
        return False
    return True


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def sha_part(facts: dict) -> int:
    return int(facts["sha256"][:7], 16)
