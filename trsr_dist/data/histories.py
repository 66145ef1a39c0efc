"""Which users count, and with which items: the length filters and the policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trsr_dist.data.items import UNKNOWN
from trsr_dist.data.logs import KnownUser, UserColumns, UserLogs
from trsr_dist.data.shared import OrderedError
from trsr_dist.data.source import Counts, shown
from trsr_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class HistoryRules:
    """The settings of the same names in the data section."""

    min_history: int
    max_history: int
    long_histories: str
    repeated_target: str


def admit_all(
    logs: UserLogs, path: Path, rules: HistoryRules, counts: Counts, id_of: Callable[[int], str] | None
) -> UserColumns:
    """What ``apply_rules`` lets through. Plain users, whom no rule concerns, are let through all at once.

    Args:
        logs: the users.
        path: of the log, for messages.
        rules: who counts.
        counts: what happened.
        id_of: from the number of an unknown item to its id; None: unknown items are left out, and counted.

    Raises:
        OrderedError: that of ``apply_rules``, or the problem of a row.
    """
    users, is_plain = logs.users, _is_plain(logs.users, rules)
    is_plain[[*logs.problems]] = False
    plain, places = np.flatnonzero(is_plain), np.flatnonzero(~is_plain)
    if len(plain):
        counts["users_read"] += len(plain)
        counts["item_ids_read"] += int(sum(column.lengths[plain].sum() for column in users.lists))
    if not len(places):
        return users
    admitted = {}
    for place in places[np.argsort(logs.places[places])].tolist():
        try:
            if place in logs.problems:
                raise DataError(logs.problems[place])
            user = apply_rules(users.user(place), f"{path}:{logs.rows[place]}", rules, counts, id_of)
        except DataError as error:
            raise OrderedError(int(logs.places[place]), str(error)) from None
        if user is not None:
            admitted[place] = user
    order = np.argsort(np.append(plain, np.array([*admitted], np.int64)))
    return users.take(plain).joined(UserColumns.from_users([*admitted.values()])).take(order)


def _is_plain(users: UserColumns, rules: HistoryRules) -> np.ndarray:
    """bool [users]: all items known, one target, which is new to the user, and a history of a length within limits."""
    lengths, is_plain = users.history.lengths, users.targets.lengths == 1
    targets = np.full(len(users), UNKNOWN)
    targets[is_plain] = users.targets.values[users.targets.ends[:-1][is_plain]]
    is_plain &= lengths >= max(1, rules.min_history)
    if rules.max_history:
        is_plain &= lengths <= rules.max_history
    is_plain &= targets >= 0
    for column in (users.history, users.shown):
        owners = column.owners
        is_plain[owners[(column.values < 0) | (column.values == targets[owners])]] = False
    return is_plain


def apply_rules(
    user: KnownUser, source: str, rules: HistoryRules, counts: Counts, id_of: Callable[[int], str] | None
) -> KnownUser | None:
    """The user in rows of the catalogue, or None where a filter leaves the user out; either way it is counted.

    Args:
        user: with the numbers of ``ItemCodes``.
        source: ``file:row``, for messages.
        rules: who counts.
        counts: what happened.
        id_of: from the number of an unknown item to its id; None: unknown items are left out, and counted.

    Raises:
        DataError: an item is unknown, and there is ``id_of``.
    """
    counts["users_read"] += 1
    if not user.history:
        return _skip("users_with_empty_history", counts)
    counts["item_ids_read"] += len(user.history) + len(user.targets) + len(user.shown)
    history, targets, shown = (
        _known(items, user, source, id_of, counts) for items in (user.history, user.targets, user.shown)
    )
    targets = list(dict.fromkeys(targets))
    if not targets:
        return _skip("users_without_target", counts)
    if len(history) < rules.min_history:
        return _skip("users_below_min_history", counts)
    if rules.max_history and len(history) > rules.max_history:
        if rules.long_histories == "skip":
            return _skip("users_above_max_history", counts)
        counts["users_with_cut_history"] += 1
    repeated = set(targets).intersection(history)
    if repeated and rules.repeated_target == "drop":
        counts["repeated_targets_dropped"] += len(repeated)
        targets = [row for row in targets if row not in repeated]
        if not targets:
            return _skip("users_with_repeated_target_dropped", counts)
    elif repeated:
        counts["users_with_repeated_target_kept"] += 1
    return KnownUser(user.user, history, targets, user.time, [row for row in shown if row not in targets])


def _skip(reason: str, counts: Counts) -> None:
    counts[reason] += 1


def _known(
    found: list[int], user: KnownUser, source: str, id_of: Callable[[int], str] | None, counts: Counts
) -> list[int]:
    if not found or min(found) >= 0:
        return found
    for item in found:
        if item < 0 and item % 2:
            counts["clicks_on_items_without_text"] += 1
        elif item < 0 and id_of is None:
            counts["clicks_on_unknown_items"] += 1
        elif item < 0:
            raise DataError(
                f"{source}: user {shown(user.user)} has item {shown(id_of(item))}, which the item file lacks; add the "
                "item, or set data.unknown_items=skip to leave such clicks out and count them"
            )
    return [item for item in found if item >= 0]
