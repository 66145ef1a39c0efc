"""Scores on disk: the part files of one pass, which restarts reuse, and the check that they cover the pass.

{folder}/identity.json      what the scores depend on: hashes of shards and model, prompt settings, sizes
{folder}/part-000000.jsonl  the users of one part, a line per candidate: user, item, label, score and, where the prompt
                            was cut to fit, trims
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, repeat
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json
from typing_extensions import TypedDict

from trsr_dist.errors import DataError, RunError
from trsr_dist.evaluate.passes import split_parts
from trsr_dist.files import atomic_file, read_json, write_json
from trsr_dist.json_text import parse_json
from trsr_dist.records import Sample

IDENTITY = "identity.json"
FACTS = ("num_users", "name")
"""What is recorded beside the identity: users of the pass, and the model's folder. Scores do not depend on them."""
SCHEMA = pa.schema([("user", pa.string()), ("item", pa.string()), ("label", pa.int64()), ("score", pa.float64())])
"""Told to the reader, which would take texts that look like dates for dates."""
SHOWN_PAIRS = 5
"""Missing or doubled pairs that an error names."""
Row = tuple[str, str, int, float, dict[str, int]]
Expected = tuple[str, Sequence[str], Sequence[int]]
"""User, item ids and labels of a sample."""


class ScoreRow(TypedDict):
    """A line of a part file."""

    user: str
    item: str
    label: int
    score: float
    trims: NotRequired[dict[str, int]]


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


def read_scores(path: Path) -> list[UserScores]:
    """The users of a part file.

    Raises:
        DataError: the file is missing, or a line is not a score.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing; run the evaluation again")
    options = arrow_json.ParseOptions(explicit_schema=SCHEMA)
    try:
        return _users(arrow_json.read_json(path, arrow_json.ReadOptions(use_threads=False), options))
    except pa.ArrowInvalid:
        # Slower, and it names the line; an empty file is fine with it.
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = (_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1))
        users = []
        for user, group in groupby(rows, key=lambda row: row[0]):
            _, items, labels, scores, trims = zip(*group, strict=True)
            users.append(UserScores(user, items, np.array(labels, np.int64), np.array(scores, np.float32), trims[0]))
        return users


def _users(table: pa.Table) -> list[UserScores]:
    """The users of a part file's rows, a row a candidate.

    Raises:
        ArrowInvalid: a field is missing.
    """
    if any(table.column(name).null_count for name in SCHEMA.names):
        raise pa.ArrowInvalid("a field is missing")
    names, items, labels, scores = (table.column(name).to_numpy() for name in SCHEMA.names)
    items, scores = items.tolist(), scores.astype(np.float32)
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
    cuts = table.column("trims").take(pa.array(starts)).to_pylist() if "trims" in table.column_names else repeat(None)
    users = []
    for start, end, cut in zip(starts, [*starts[1:], len(names)], cuts, strict=False):
        trims = {name: count for name, count in (cut or {}).items() if count is not None}
        users.append(UserScores(names[start], tuple(items[start:end]), labels[start:end], scores[start:end], trims))
    return users


def _row(line: str, place: str) -> Row:
    try:
        row: ScoreRow = parse_json(line, ScoreRow)
        return row["user"], row["item"], row["label"], row["score"], row.get("trims", {})
    except DataError as error:
        raise DataError(f"{place}: not a score ({error}); remove the file and run the evaluation again") from None


def expected_of(sample: Sample) -> Expected:
    """User, item ids and labels of a sample."""
    return sample.user, [c.item for c in sample.candidates], [c.label for c in sample.candidates]


def align(path: Path, expected: Sequence[Expected], found: Sequence[UserScores]) -> list[UserScores]:
    """The scores in the order of the samples and their candidates, as they are written.

    Args:
        path: of the part file, for the message.
        expected: the samples of the part.
        found: what the file holds.

    Raises:
        DataError: names pairs that are missing, doubled, unknown or differently labelled.
    """
    written = [(user.user, list(user.items), user.labels.tolist()) for user in found]
    if written == [(user, list(items), list(labels)) for user, items, labels in expected]:
        return list(found)
    check_coverage(path, expected, found)
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


def check_coverage(path: Path, expected: Sequence[Expected], found: Sequence[UserScores]) -> None:
    """Assert that the scores hold every (user, candidate) exactly once, with its label; arguments as of ``align``.

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
            f"{path}: the scores do not cover the part: {lacking.total()} of {wanted.total()} (user, item, label) "
            f"missing{_named(list(lacking))}, {len(doubled)} doubled{_named(doubled)}, {len(unknown)} unknown"
            f"{_named(unknown)}; remove the file and run the evaluation again"
        )


def _named(pairs: list[tuple[str, str, int]]) -> str:
    if not pairs:
        return ""
    return " (" + ", ".join(map(str, pairs[:SHOWN_PAIRS])) + (", ...)" if len(pairs) > SHOWN_PAIRS else ")")


class ScoreFolder:
    """The part files of one pass over a split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._identity: dict[str, Any] | None = None

    def open(self, identity: dict[str, Any], num_users: int, name: str) -> None:
        """Resume a folder for these inputs, or begin it. From then on it must stay theirs.

        Args:
            identity: what the scores depend on.
            num_users: of the pass.
            name: of the model.

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
                "or --force to score again"
            )
        else:
            write_json(self.folder / IDENTITY, self._identity | dict(zip(FACTS, (num_users, name), strict=True)))

    def check(self) -> None:
        """The folder must still be that of the inputs it was opened for.

        Raises:
            RunError: it is another evaluation's.
        """
        if self._identity is None:
            return
        recorded = self.recorded()
        for key in sorted((recorded.keys() | self._identity.keys()) - set(FACTS)):
            if recorded.get(key) != self._identity.get(key):
                raise RunError(
                    f"{self.folder}: holds scores made with {key}={recorded.get(key)!r}, now "
                    f"{self._identity.get(key)!r}; use another --output, or --force to score again"
                )

    def recorded(self) -> dict[str, Any]:
        """Identity and facts that stand in the folder; empty where none do."""
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

    def missing(self, num_users: int) -> list[int]:
        """Parts that nobody has scored yet."""
        return [part for part in range(len(split_parts(num_users))) if not self.has(part)]

    def write(self, part: int, users: Sequence[UserScores]) -> None:
        """Publish a part, whole or not at all.

        Raises:
            RunError: the folder has become another evaluation's.
        """
        self.check()
        with atomic_file(self.path(part)) as stream:
            for user in users:
                for item, label, score in zip(user.items, user.labels.tolist(), user.scores.tolist(), strict=True):
                    row = {"user": user.user, "item": item, "label": label, "score": score}
                    stream.write(json.dumps(row | ({"trims": user.trims} if user.trims else {})) + "\n")

    def read(self, part: int, expected: Sequence[Expected]) -> list[UserScores]:
        """The scores of a part, in the order of its samples and their candidates.

        Raises:
            DataError: they do not cover the part exactly.
        """
        return align(self.path(part), expected, read_scores(self.path(part)))

    def users(self) -> Iterator[UserScores]:
        """The users of all parts that are there, in order."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            yield from read_scores(path)

    def check_names(self, num_users: int) -> None:
        """Refuse files that are not parts of a pass with this many users.

        Raises:
            DataError: names one.
        """
        num_parts = len(split_parts(num_users))
        known = {self.path(part).name for part in range(num_parts)}
        unknown = sorted({path.name for path in self.folder.glob("part-*")} - known)
        if unknown:
            raise DataError(
                f"{self.folder / unknown[0]}: no part of this evaluation, which has {num_parts} of {num_users} users; "
                "remove the file"
            )
