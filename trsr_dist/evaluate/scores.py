"""Scores on disk: part files that restarts reuse, and the check that every (user, candidate) is there exactly once.

{folder}/identity.json      what the scores depend on: hashes of shards and model, prompt settings, sizes
{folder}/part-000000.jsonl  the users of one part: a line per candidate with user, item, label, score and, where the
                            prompt was cut to fit, trims
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from trsr_dist.errors import DataError, RunError
from trsr_dist.files import atomic_file, read_json, write_json

IDENTITY = "identity.json"
SHOWN = 5
"""So many missing or doubled pairs are named in an error."""


Expected = tuple[str, Sequence[str], Sequence[int]]
"""User, item ids and labels of a sample."""


@dataclass(frozen=True, slots=True)
class UserScores:
    """A user's scored candidates, in the order of the sample."""

    user: str
    items: tuple[str, ...]
    labels: np.ndarray
    """int64, shape (num_candidates,)."""
    scores: np.ndarray
    """float32 log-odds, shape (num_candidates,)."""
    trims: dict[str, int] = field(default_factory=dict)


class ScoreFolder:
    """The part files of one pass over a split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._identity: dict[str, Any] | None = None

    def open(self, identity: dict[str, Any]) -> None:
        """Take up a folder for these inputs, or begin it. From then on it must stay theirs.

        Raises:
            RunError: it holds scores of other shards, another model or other settings.
        """
        self._identity = json.loads(json.dumps(identity))
        # Parts are looked for first: another task may write the identity, then parts, between two looks.
        has_parts = self.folder.is_dir() and any(self.folder.glob("part-*"))
        if (self.folder / IDENTITY).is_file():
            self.check()
        elif has_parts:
            raise RunError(
                f"{self.folder}: holds scores but no {IDENTITY}, so whose they are is unknown; use another --output, "
                "or --force to score anew"
            )
        else:
            write_json(self.folder / IDENTITY, self._identity)

    def check(self) -> None:
        """The folder must still be that of the inputs it was opened for.

        Raises:
            RunError: it is another evaluation's.
        """
        if self._identity is None:
            return
        recorded = self.recorded()
        for key in sorted(recorded.keys() | self._identity.keys()):
            if recorded.get(key) != self._identity.get(key):
                raise RunError(
                    f"{self.folder}: holds scores made with {key}={recorded.get(key)!r}, now "
                    f"{self._identity.get(key)!r}; use another --output, or --force to score anew"
                )

    def recorded(self) -> dict[str, Any]:
        """The identity that stands in the folder; empty where none does."""
        return read_json(self.folder / IDENTITY) if (self.folder / IDENTITY).is_file() else {}

    def clear(self) -> None:
        """Remove parts and identity; the identity last, so that a kill in between leaves no unknown scores."""
        for path in [*sorted(self.folder.glob("part-*.jsonl")), self.folder / IDENTITY]:
            path.unlink(missing_ok=True)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.jsonl"

    def has(self, part: int) -> bool:
        """Whether the part is complete: files appear whole or not at all."""
        return self.path(part).is_file()

    def missing(self, num_parts: int) -> list[int]:
        return [part for part in range(num_parts) if not self.has(part)]

    def write(self, part: int, users: Sequence[UserScores]) -> None:
        """Publish a part.

        Raises:
            RunError: the folder has become another evaluation's.
        """
        self.check()
        with atomic_file(self.path(part)) as stream:
            for user in users:
                for item, label, score in zip(user.items, user.labels.tolist(), user.scores.tolist(), strict=True):
                    row = {"user": user.user, "item": item, "label": label, "score": score}
                    stream.write(json.dumps(row | ({"trims": user.trims} if user.trims else {})) + "\n")

    def read(self) -> list[UserScores]:
        """All users of all parts, in order.

        Raises:
            DataError: a line is not a score.
            RunError: the folder has become another evaluation's.
        """
        users = [user for path in sorted(self.folder.glob("part-*.jsonl")) for user in read_scores(path)]
        self.check()
        return users


def read_scores(path: Path) -> list[UserScores]:
    """The users of a part file.

    Raises:
        DataError: a line is not a score.
    """
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(_lines(path), 1)]
    users = []
    for user, group in groupby(rows, key=lambda row: row["user"]):
        entries = list(group)
        users.append(
            UserScores(
                user,
                tuple(entry["item"] for entry in entries),
                np.array([entry["label"] for entry in entries], dtype=np.int64),
                np.array([entry["score"] for entry in entries], dtype=np.float32),
                entries[0].get("trims", {}),
            )
        )
    return users


def check_coverage(folder: Path, expected: Iterable[Expected], found: Sequence[UserScores]) -> None:
    """Assert that the scores hold every (user, candidate) of the split exactly once, with its label.

    Args:
        folder: of the part files, for the message.
        expected: every sample of the split.
        found: what the part files hold.

    Raises:
        DataError: names pairs that are missing, doubled, unknown or differently labelled.
    """
    wanted = Counter(
        (user, item, int(label)) for user, items, labels in expected for item, label in zip(items, labels, strict=True)
    )
    have = Counter(
        (user.user, item, label) for user in found for item, label in zip(user.items, user.labels.tolist(), strict=True)
    )
    lacking, surplus = wanted - have, have - wanted
    if lacking or surplus:
        known = {pair[:2] for pair in wanted}
        doubled = [pair for pair in surplus if pair in wanted]
        unknown = [pair for pair in surplus if pair[:2] not in known]
        raise DataError(
            f"{folder}: the scores do not cover the split: {lacking.total()} of {wanted.total()} (user, item, label) "
            f"missing{_named(list(lacking))}, {len(doubled)} doubled{_named(doubled)}, {len(unknown)} unknown"
            f"{_named(unknown)}; remove the part files that are wrong, or use --force"
        )


def in_order(expected: Iterable[Expected], found: Sequence[UserScores]) -> list[UserScores]:
    """Scores that cover the split, in the order of its users and candidates."""
    scores = {
        (user.user, item): score for user in found for item, score in zip(user.items, user.scores.tolist(), strict=True)
    }
    trims = {user.user: user.trims for user in found}
    return [
        UserScores(
            user,
            tuple(items),
            np.array(labels, dtype=np.int64),
            np.array([scores[user, item] for item in items], dtype=np.float32),
            trims[user],
        )
        for user, items, labels in expected
    ]


def _named(pairs: list[tuple[str, str, int]]) -> str:
    if not pairs:
        return ""
    return " (" + ", ".join(map(str, pairs[:SHOWN])) + (", ...)" if len(pairs) > SHOWN else ")")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        float(row["score"]), int(row["label"]), row["user"], row["item"]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: not a score ({error!r}); remove the file and run the evaluation again") from None
    return row
