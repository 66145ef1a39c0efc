"""The records that cross stage borders. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """A catalogue item as the prompts see it."""

    id: str
    text: str
    """The chosen fields in one line, white space normalized; never the raw id."""
    category: str = ""
    """Used by category-hard negatives and by the evaluation's slices; empty where unknown."""


@dataclass(frozen=True, slots=True)
class UserLog:
    """One user as a reader of raw data yields it: everything before the target, then the target."""

    user: str
    history: tuple[str, ...]
    """Item ids, oldest first; holds only what came before the targets."""
    targets: tuple[str, ...]
    """Item ids of the next interaction: usually one."""
    time: int = 0
    """Unix seconds of the target, 0 where the data has no time."""
    shown: tuple[str, ...] = ()
    """Item ids shown to the user together with the target and not chosen (impressions)."""
    source: str = ""
    """``file:row``, for error messages."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One item to be scored for a user."""

    item: str
    text: str
    label: int
    """1 for a target, 0 for a negative."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One user in a shard: all that is needed to write the user's prompts."""

    user: str
    instruction: str
    summary: str
    recent: tuple[str, ...]
    """Texts of the most recent items, oldest first."""
    candidates: tuple[Candidate, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    """Block ids, engine, model, prompt hash, decoding, seed, history item ids and flags."""


@dataclass(frozen=True, slots=True)
class Score:
    """The log-odds that the model gave to one candidate of a user."""

    user: str
    item: str
    label: int
    score: float
