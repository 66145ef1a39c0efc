"""The check that every (user, candidate) of a part is scored exactly once. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.evaluate.score_files import UserScores

SHOWN = 5
"""So many missing or doubled pairs are named in an error."""

Expected = tuple[str, Sequence[str], Sequence[int]]
"""User, item ids and labels of a sample."""


def align(path: Path, expected: Sequence[Expected], found: Sequence[UserScores]) -> list[UserScores]:
    """The scores in the order of the samples and their candidates, as they are written.

    Args:
        path: of the part file, for the message.
        expected: the samples of the part.
        found: what the file holds.

    Raises:
        DataError: names pairs that are missing, doubled, unknown or differently labelled.
    """
    if len(found) == len(expected) and all(map(_is_covered, expected, found)):
        return list(found)
    check_coverage(path, expected, found)
    return _in_order(expected, found)


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


def _is_covered(expected: Expected, found: UserScores) -> bool:
    user, items, labels = expected
    return found.user == user and found.items == tuple(items) and found.labels.tolist() == list(labels)


def _in_order(expected: Sequence[Expected], found: Sequence[UserScores]) -> list[UserScores]:
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
