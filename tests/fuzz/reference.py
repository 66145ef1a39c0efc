"""A second reader of the raw formats, written apart from the first: what a set means, or why it means nothing.

It is strict where meaning is doubtful (``RefusedError``: a key or column twice, a row of another width, a header among
the rows, an id with two texts) and free where two readings are fair: texts are compared without white space and
invisible characters, times as seconds or as they stand, users of unknown times without the order of their clicks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.rows import HEADERS, READERS, Log, Policy, RefusedError, plain


@dataclass(frozen=True)
class User:
    """What a user's row must become."""

    history: tuple[str, ...]
    targets: frozenset[str]
    time: float | None
    """None: any."""
    ordered: bool = True
    """False: the clicks' times are in doubt, so is which is the last."""


@dataclass(frozen=True)
class Meaning:
    """The whole set."""

    items: dict[str, str]
    """Text of each id, without white space."""
    users: list[tuple[str, User]]
    """Key (empty where the format has none) and content."""
    losses: list[str]
    """What of the files is not in the above."""


def meaning(data_format: str, raw: Path, policy: Policy) -> Meaning:
    """What preparation must make of the files.

    Raises:
        RefusedError: an error, or a count that says so, is right.
    """
    read_items, read_logs = READERS[data_format]
    items, removed = _catalogue(read_items(raw, policy), policy)
    users, losses = [], [f"item {item!r} without text" for item in removed]
    for log in read_logs(raw, policy):
        user = _admit(log, items, removed, policy)
        if user is None:
            losses.append(f"user {log.user!r}")
            continue
        users.append(("" if data_format == "amazon_m2" else log.user, user))
        if not items.keys() >= {*log.history, *log.targets}:
            losses.append(f"clicks of user {log.user!r}")
    return Meaning(items, users, losses)


def _catalogue(rows: Iterator[tuple[str, str]], policy: Policy) -> tuple[dict[str, str], set[str]]:
    items: dict[str, str] = {}
    for item, text in rows:
        if not item.strip() or item.strip().lower() in HEADERS:
            raise RefusedError(f"item id {item!r}")
        text = plain(text)
        if items.setdefault(item.strip(), text) != text:
            raise RefusedError(f"item {item!r} has two texts")
    removed = {item for item, text in items.items() if not text}
    if removed and policy.empty == "fail":
        raise RefusedError("an item without text")
    return {item: text for item, text in items.items() if text}, removed


def _admit(log: Log, items: dict[str, str], removed: set[str], policy: Policy) -> User | None:
    for item in (*log.history, *log.targets):
        if item not in items and item not in removed and policy.unknown == "fail":
            raise RefusedError(f"unknown item {item!r}")
    history = [item for item in log.history if item in items]
    targets = {item for item in log.targets if item in items}
    if not targets or len(history) < policy.min_history:
        return None
    if policy.max_history and len(history) > policy.max_history and policy.long == "skip":
        return None
    if policy.repeated == "drop":
        targets -= set(history)
        if not targets and log.ordered:
            return None
    kept = history[-policy.max_history :] if policy.max_history else history
    return User(tuple(kept), frozenset(targets), log.time, log.ordered)
