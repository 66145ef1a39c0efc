"""Prompt lengths of real users, for benchmarks and simulations without data.

Measured with the shards of ``configs/mind.yaml`` and ``configs/amazon_m2.yaml`` (extractive summaries) on fragments of
MIND-small (451 train users) and Amazon Reviews Scientific (315), under byte-level BPEs of 16,000 tokens trained on the
same texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trsr_dist.hashing import random_stream


@dataclass(frozen=True, slots=True)
class Mix:
    """Tokens of the prompts of a data set."""

    name: str
    head: int
    """Tokens that all prompts begin with."""
    prefixes: tuple[int, ...]
    """Quantiles at 5%, 15%, ... 95%."""
    suffixes: tuple[int, ...]

    def lengths(self, number: int, num_candidates: int) -> tuple[int, list[int]]:
        """Prefix and suffixes of a user: prefixes in turn, suffixes drawn by the user's number."""
        draw = random_stream("lengths", self.name, number)
        return self.prefixes[number % len(self.prefixes)], [draw.choice(self.suffixes) for _ in range(num_candidates)]

    def users(self, numbers: Iterator[int] | range, num_candidates: int) -> list[tuple[int, list[int]]]:
        """Lengths of some users."""
        return [self.lengths(number, num_candidates) for number in numbers]


MIND = Mix(
    "MIND",
    49,
    (372, 407, 431, 452, 477, 503, 526, 541, 552, 568),
    (21, 23, 24, 25, 26, 27, 29, 30, 32, 38),
)
AMAZON = Mix(
    "Amazon",
    48,
    (763, 899, 971, 1037, 1101, 1159, 1220, 1298, 1437, 1582),
    (31, 43, 59, 82, 111, 139, 164, 200, 257, 259),
)
