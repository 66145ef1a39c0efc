"""What is scored: passes over a split, parts of users, packed rows of a part. Pure.

Parts and rows do not depend on the number of ranks, so that float32 scores are equal to the last digit however many
there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trsr_dist.records import TokenizedUser

USERS_PER_PART = 64
"""Users of one part file: what a kill can cost one rank."""
Change = Literal["none", "control", "no_summary", "no_recent"]
"""Of the prompt: ``control`` shows another user's text."""


@dataclass(frozen=True, slots=True)
class ScoringPass:
    """One system that a language model scores on one candidate list."""

    system: str
    source: Literal["model", "base"] = "model"
    change: Change = "none"
    protocol: str = ""
    """Of the candidates; empty: the shards' own."""

    @property
    def name(self) -> str:
        """Folder of the scores, below the split's."""
        return f"{self.protocol}/{self.system}" if self.protocol else self.system


ALWAYS = (ScoringPass("model"), ScoringPass("control", change="control"))
OPTIONAL = (
    ScoringPass("no_summary", change="no_summary"),
    ScoringPass("no_recent", change="no_recent"),
    ScoringPass("base", source="base"),
)


def drawn_protocols(asked: Sequence[str], own: str) -> list[str]:
    """Candidate lists that are drawn beside the shards' ``own``; of the same kind they would say nothing new."""
    return [name for name in asked if name != own]


def plan_passes(baselines: Sequence[str], protocols: Sequence[str]) -> list[ScoringPass]:
    """Model and control on every candidate list, and the asked baselines that need a language model on the own one."""
    asked = [entry for entry in OPTIONAL if entry.system in baselines]
    return [*ALWAYS, *asked, *(replace(entry, protocol=protocol) for protocol in protocols for entry in ALWAYS)]


@dataclass(frozen=True, slots=True)
class RowEntry:
    """Some candidates of one user in a row."""

    user: int
    """Position in the part."""
    candidates: tuple[int, ...]


def split_parts(num_users: int) -> list[range]:
    """Positions of each part's users in the split."""
    return [range(first, min(first + USERS_PER_PART, num_users)) for first in range(0, num_users, USERS_PER_PART)]


def assign_parts(costs: Sequence[int], num_workers: int) -> list[list[int]]:
    """Give each part to the worker with the least to do, dearest parts first (Graham's rule, 1969).

    Returns:
        Parts of each worker, ascending.
    """
    loads, parts = [0] * num_workers, [[] for _ in range(num_workers)]
    for part in sorted(range(len(costs)), key=lambda part: (-costs[part], part)):
        worker = loads.index(min(loads))
        loads[worker] += costs[part]
        parts[worker].append(part)
    return [sorted(chosen) for chosen in parts]


def pack_part(users: Sequence[TokenizedUser], row_tokens: int) -> list[list[RowEntry]]:
    """Fill rows of at most ``row_tokens`` tokens, first fit by decreasing length.

    A user who is longer than a row is cut into groups of candidates, each behind a copy of the prefix; one candidate
    that is longer than a row gets its own row.
    """
    pieces = [piece for index, user in enumerate(users) for piece in _pieces(index, user, row_tokens)]
    pieces.sort(key=lambda piece: (-piece[0], piece[1].user, piece[1].candidates))
    rows: list[list[RowEntry]] = []
    free: list[int] = []
    for length, entry in pieces:
        place = next((place for place, room in enumerate(free) if room >= length), None)
        if place is None:
            rows.append([])
            free.append(row_tokens)
            place = len(rows) - 1
        rows[place].append(entry)
        free[place] -= length
    return rows


def _pieces(index: int, user: TokenizedUser, row_tokens: int) -> list[tuple[int, RowEntry]]:
    pieces: list[tuple[int, list[int]]] = []
    for candidate, suffix in enumerate(user.suffixes):
        if not pieces or pieces[-1][0] + len(suffix) > row_tokens:
            pieces.append((len(user.prefix), []))
        length, candidates = pieces[-1]
        pieces[-1] = (length + len(suffix), [*candidates, candidate])
    return [(length, RowEntry(index, tuple(candidates))) for length, candidates in pieces]
