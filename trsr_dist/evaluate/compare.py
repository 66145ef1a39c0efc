"""Paired comparison of two evaluations on the same users and candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.evaluate.metrics import OutcomeTable, average, check_user
from trsr_dist.evaluate.passes import split_parts
from trsr_dist.evaluate.score_files import ScoreFolder, UserScores
from trsr_dist.evaluate.statistics import paired_differences
from trsr_dist.evaluate.table import column_title, format_table
from trsr_dist.hashing import hash64
from trsr_dist.records import metric_names
from trsr_dist.run import SPLITS

USERS_AT_ONCE = 1024
SHOWN_PARTS = 5


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two evaluations."""

    folder: Path
    model: str
    """Folder of the model, or its hash where that is not recorded."""
    users: dict[str, tuple[int, int]]
    """Number of the outcome and hash of the candidates of each user."""


def compare(
    paths: tuple[Path, Path], split: str, top_k: Sequence[int], num_samples: int, seed: int, unfinished: bool = False
) -> str:
    """What is compared, and a table with both means, the paired difference, its 95% interval and its p-value.

    Args:
        paths: evaluation folders, or folders of part files.
        split: of evaluation folders.
        top_k: cut-offs.
        num_samples: resamples and sign vectors.
        seed: of both.
        unfinished: compare the users that both have.

    Raises:
        DataError: there are no scores, some are missing, or users or candidates differ.
    """
    table = OutcomeTable(top_k)
    one, other = (read_side(find_scores(path, split), table, unfinished) for path in paths)
    pairs = pair_users(one, other, unfinished)
    numbers = [np.array(column) for column in zip(*pairs, strict=True)]
    means = [average(*table.counted(found)) for found in numbers]
    differences = paired_differences(*table.paired(*numbers), num_samples, seed)
    rows = []
    for name, mean, other_mean, found in zip(metric_names(top_k), *means, differences, strict=True):
        signed = [f"{value:+.4f}" for value in (found.mean, found.low, found.high)]
        rows.append((column_title(name), [f"{mean:.4f}", f"{other_mean:.4f}", *signed, f"{found.p_value:.4f}"]))
    heads = [f"{name}: {side.folder} (model {side.model})" for name, side in (("A", one), ("B", other))]
    lines = [*heads, format_table("metric", ["A", "B", "A - B", "95% low", "95% high", "p"], rows)]
    return "\n".join([*lines, f"{len(pairs)} users, {num_samples} resamples"])


def find_scores(path: Path, split: str) -> ScoreFolder:
    """The scores of an evaluation.

    Args:
        path: a folder of part files such as ``RUN/evaluation/test/control``, or ``RUN/evaluation``, which stands for
            the model's own scores.
        split: used with the latter.

    Raises:
        DataError: no part files lie there, or it is the folder of another split.
    """
    for folder in (path, path / "model", path / split / "model"):
        if any(folder.glob("part-*.jsonl")):
            if folder == path / "model" and path.name in SPLITS and path.name != split:
                raise DataError(f"{path}: the users of {path.name}, and --split is {split}; add --split {path.name}")
            return ScoreFolder(folder)
    raise DataError(f"{path}: no part-*.jsonl here nor in {path / split / 'model'}; name an evaluation's folder")


def read_side(folder: ScoreFolder, table: OutcomeTable, unfinished: bool) -> Side:
    """Outcomes of an evaluation's users.

    Raises:
        DataError: it is not finished, and that is not allowed; a user is scored twice, or has no metric.
    """
    recorded = folder.recorded()
    if "num_users" in recorded:
        folder.check_names(recorded["num_users"])
        check_finished(folder, recorded["num_users"], unfinished)
    users: dict[str, tuple[int, int]] = {}
    waiting = folder.users()
    while batch := list(islice(waiting, USERS_AT_ONCE)):
        for user in batch:
            check_user(user.user, user.scores, user.labels, user.items)
        numbers = table.add([user.scores for user in batch], [user.labels for user in batch])
        for user, number in zip(batch, numbers.tolist(), strict=True):
            if user.user in users:
                raise DataError(f"{folder.folder}: user {user.user!r} is scored twice; run its evaluation with --force")
            users[user.user] = number, candidates_of(user)
    model = recorded.get("name") or str(recorded.get("model", "unknown"))[:12]
    return Side(folder.folder, model, users)


def check_finished(folder: ScoreFolder, num_users: int, unfinished: bool) -> None:
    """All parts must be there, unless the user says otherwise.

    Raises:
        DataError: names what is missing.
    """
    missing = folder.missing(num_users)
    if missing and not unfinished:
        parts = split_parts(num_users)
        scored = num_users - sum(len(parts[part]) for part in missing)
        named = ", ".join(map(str, missing[:SHOWN_PARTS])) + (", ..." if len(missing) > SHOWN_PARTS else "")
        raise DataError(
            f"{folder.folder}: {scored:,} of {num_users:,} users are scored (parts {named} missing); run its "
            "evaluation to the end, or --unfinished compares the users that both have"
        )


def pair_users(one: Side, other: Side, unfinished: bool) -> list[tuple[int, int]]:
    """Outcomes of the users of both, in the order of the first.

    Raises:
        DataError: users or candidates differ: their metrics cannot be paired.
    """
    different = sorted(one.users.keys() ^ other.users.keys())
    if different and not unfinished:
        raise DataError(
            f"user {different[0]!r} and {len(different) - 1} more stand in one of the two only; compare evaluations "
            "of the same users, or --unfinished compares the users that both have"
        )
    pairs = []
    for user, (number, candidates) in one.users.items():
        if user not in other.users:
            continue
        if other.users[user][1] != candidates:
            raise DataError(
                f"user {user!r} has other candidates in the two; compare evaluations of the same candidate lists"
            )
        pairs.append((number, other.users[user][0]))
    if not pairs:
        raise DataError(f"{one.folder} and {other.folder}: no user stands in both")
    return pairs


def candidates_of(user: UserScores) -> int:
    """A hash of the items with their labels, whatever their order."""
    return hash64(*sorted(zip(user.items, user.labels.tolist(), strict=True)))
