"""How many tokens and attended pairs a set of prompts has, with the prefix shared and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """Counts of a forward pass over some prompts; they add up."""

    tokens: int = 0
    pairs: int = 0
    """Query-key pairs that causal attention looks at, in one head of one layer."""
    answers: int = 0
    """Prompts, one a candidate."""
    users: int = 0

    def __add__(self, other: Workload) -> Workload:
        return Workload(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.answers + other.answers,
            self.users + other.users,
        )

    def scaled(self, factor: float) -> Workload:
        """The counts of ``factor`` times as much work, rounded."""
        counts = (self.tokens, self.pairs, self.answers, self.users)
        return Workload(*(round(count * factor) for count in counts))


def shared_workload(prefix: int, suffixes: Sequence[int]) -> Workload:
    """One user with the prefix computed once: each suffix attends to the prefix and to itself."""
    pairs = triangle(prefix) + sum(prefix * suffix + triangle(suffix) for suffix in suffixes)
    return Workload(prefix + sum(suffixes), pairs, len(suffixes), 1)


def separate_workload(prefix: int, suffixes: Sequence[int]) -> Workload:
    """The same prompts as sequences of their own."""
    lengths = [prefix + suffix for suffix in suffixes]
    return Workload(sum(lengths), sum(map(triangle, lengths)), len(suffixes), 1)


def triangle(length: int) -> int:
    """Pairs of one causal sequence."""
    return length * (length + 1) // 2
