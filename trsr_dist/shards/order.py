"""The order of an epoch as a pure function of (seed, epoch, position): no permutation array, no state. Pure: numpy.

Blocks of neighbouring samples are permuted over the whole set by a keyed permutation of their numbers; a window of the
epoch is the next few of them, and its samples are mixed when they are packed. Neighbours within a block keep the reads
of a cold file in one piece; users stand in the shards by the hash of their key, so neighbours are random users. The
blocks' borders move with the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trsr_dist.hashing import hash64

BLOCK_SAMPLES = 32
ROUNDS = 4
"""Feistel rounds: four of a random function are indistinguishable from a random permutation (Luby and Rackoff 1988)."""


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 to uint64, elementwise: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: np.ndarray, size: int, *key: object) -> np.ndarray:
    """Where a keyed permutation of ``range(size)`` sends these positions.

    A balanced Feistel network on the next even power of two; values beyond ``size`` are sent round again until they
    fall within it (cycle walking; Black and Rogaway 2002). Constant memory, any size.

    Args:
        positions: int64, any shape, each below ``size``.
        size: of the permuted range.
        *key: whatever names the permutation, such as (seed, epoch).

    Returns:
        int64, the same shape.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = [np.uint64(hash64(*key, number)) for number in range(ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half_bits) | right


@dataclass(frozen=True, slots=True)
class Order:
    """Order of the samples of an epoch, in windows."""

    num_samples: int
    window_blocks: int
    seed: int

    @property
    def num_windows(self) -> int:
        return -(-self._num_blocks // self.window_blocks)

    def runs(self, epoch: int, window: int) -> list[tuple[int, int]]:
        """(start, stop) of the neighbouring samples that make up a window; over all windows each sample once.

        The block that the set's size leaves over, if any, ends the epoch.
        """
        full_blocks, rest = divmod(self.num_samples, BLOCK_SAMPLES)
        first = window * self.window_blocks
        numbers = np.arange(first, min(first + self.window_blocks, full_blocks))
        blocks = permute(numbers, full_blocks, self.seed, epoch, "blocks") if len(numbers) else numbers
        runs = [run for block in blocks.tolist() for run in self._run(epoch, block, BLOCK_SAMPLES)]
        if rest and window == self.num_windows - 1:
            runs += self._run(epoch, full_blocks, rest)
        return runs

    @property
    def _num_blocks(self) -> int:
        return -(-self.num_samples // BLOCK_SAMPLES)

    def _run(self, epoch: int, block: int, size: int) -> list[tuple[int, int]]:
        """A block's samples on the ring of all samples, turned by a different amount each epoch."""
        turn = hash64(self.seed, epoch, "turn") % self.num_samples
        start = (block * BLOCK_SAMPLES + turn) % self.num_samples
        stop = start + size
        if stop <= self.num_samples:
            return [(start, stop)]
        return [(start, self.num_samples), (0, stop - self.num_samples)]
