"""One part file: a line per candidate with user, item, label, score and, where the prompt was cut to fit, trims."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NotRequired

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json
from typing_extensions import TypedDict

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file
from trsr_dist.json_text import parse_json

SCHEMA = pa.schema([("user", pa.string()), ("item", pa.string()), ("label", pa.int64()), ("score", pa.float64())])
"""Told to the reader, which would take texts that look like dates for dates."""
Row = tuple[str, str, int, float, dict[str, int]]


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


def write_scores(path: Path, users: Sequence[UserScores]) -> None:
    """Write a part file, whole or not at all."""
    with atomic_file(path) as stream:
        for user in users:
            for item, label, score in zip(user.items, user.labels.tolist(), user.scores.tolist(), strict=True):
                row = {"user": user.user, "item": item, "label": label, "score": score}
                stream.write(json.dumps(row | ({"trims": user.trims} if user.trims else {})) + "\n")


def read_scores(path: Path) -> list[UserScores]:
    """The users of a part file.

    Raises:
        DataError: the file is missing, or a line is not a score.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing; run the evaluation again")
    users = []
    for user, group in groupby(_rows(path), key=lambda row: row[0]):
        _, items, labels, scores, trims = zip(*group, strict=True)
        users.append(UserScores(user, items, np.array(labels, np.int64), np.array(scores, np.float32), trims[0] or {}))
    return users


def _rows(path: Path) -> Iterator[Row]:
    options = arrow_json.ParseOptions(explicit_schema=SCHEMA)
    try:
        table = arrow_json.read_json(path, arrow_json.ReadOptions(use_threads=False), options)
        if any(table.column(name).null_count for name in SCHEMA.names):
            raise pa.ArrowInvalid("a field is missing")
    except pa.ArrowInvalid:
        # Slower, and it names the line; an empty file is fine with it.
        return (_row(line, f"{path}:{number}") for number, line in enumerate(_lines(path), 1))
    trims = _trims(table) if "trims" in table.column_names else [{}] * len(table)
    return zip(*(table.column(name).to_pylist() for name in SCHEMA.names), trims, strict=True)


def _trims(table: pa.Table) -> list[dict[str, int]]:
    found = table.column("trims").to_pylist()
    return [{name: count for name, count in (trims or {}).items() if count is not None} for trims in found]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _row(line: str, place: str) -> Row:
    try:
        row: ScoreRow = parse_json(line, ScoreRow)
        return row["user"], row["item"], row["label"], row["score"], row.get("trims", {})
    except DataError as error:
        raise DataError(f"{place}: not a score ({error}); remove the file and run the evaluation again") from None
