"""Paired comparison of two evaluations on the same users and candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.evaluate.confidence import Difference, paired_differences
from trsr_dist.evaluate.metrics import average, metric_names, user_metrics
from trsr_dist.evaluate.scores import ScoreFolder, UserScores
from trsr_dist.evaluate.table import column_title, format_table


def open_scores(path: Path, split: str) -> list[UserScores]:
    """Scores of an evaluation.

    Args:
        path: a folder of part files such as ``RUN/evaluation/test/control``, or ``RUN/evaluation``, which stands for
            the model's own scores.
        split: used with the latter.

    Raises:
        DataError: no part files lie there.
    """
    for folder in (path, path / "model", path / split / "model"):
        scores = ScoreFolder(folder).read()
        if scores:
            return scores
    raise DataError(f"{path}: no part-*.jsonl here nor in {path / split / 'model'}; name an evaluation's folder")


def pair_users(one: Sequence[UserScores], other: Sequence[UserScores]) -> list[tuple[UserScores, UserScores]]:
    """The users of both, in the order of the first.

    Raises:
        DataError: users or candidates differ: their metrics cannot be paired.
    """
    by_user = {user.user: user for user in other}
    different = sorted({user.user for user in one} ^ by_user.keys())
    if different:
        raise DataError(
            f"user {different[0]!r} and {len(different) - 1} more stand in one of the two only; "
            "compare evaluations of the same users"
        )
    for user in one:
        if candidates_of(user) != candidates_of(by_user[user.user]):
            raise DataError(
                f"user {user.user!r} has other candidates in the two; compare evaluations of the same candidate lists"
            )
    return [(user, by_user[user.user]) for user in one]


def candidates_of(user: UserScores) -> list[tuple[str, int]]:
    """Items with labels, in a fixed order."""
    return sorted(zip(user.items, user.labels.tolist(), strict=True))


def compare_scores(
    pairs: Sequence[tuple[UserScores, UserScores]], top_k: Sequence[int], num_samples: int, seed: int
) -> str:
    """A table with both means, the paired difference, its 95% interval and its p-value, one row a metric."""
    one, other = (
        np.array([user_metrics(pair[side].scores, pair[side].labels, top_k) for pair in pairs]) for side in (0, 1)
    )
    names = metric_names(top_k)
    found = paired_differences(one, other, num_samples, seed)
    rows = [
        (column_title(name), _cells(*entry))
        for name, *entry in zip(names, average(one), average(other), found, strict=True)
    ]
    table = format_table("metric", ["A", "B", "A - B", "95% low", "95% high", "p"], rows)
    return f"{table}\n{len(pairs)} users, {num_samples} resamples"


def _cells(one: float, other: float, difference: Difference) -> list[str]:
    signed = [f"{value:+.4f}" for value in (difference.mean, difference.low, difference.high)]
    return [f"{one:.4f}", f"{other:.4f}", *signed, f"{difference.p_value:.4f}"]
