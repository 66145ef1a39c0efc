"""Which users count, and with which items: the length filters and the policies. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trsr_dist.data.source import Counts, shown
from trsr_dist.errors import DataError
from trsr_dist.records import UserLog

REMOVED = -1
"""Row of an item that data.empty_items left out."""


@dataclass(frozen=True, slots=True)
class HistoryRules:
    """The settings of the same names in the data section."""

    min_history: int
    max_history: int
    long_histories: str
    repeated_target: str
    unknown_items: str


@dataclass(frozen=True, slots=True)
class KnownUser:
    """A user whose items are rows of the catalogue."""

    user: str
    history: list[int]
    """Everything before the targets, oldest first, not cut."""
    targets: list[int]
    time: int
    shown: list[int]


def admit(log: UserLog, rows: Mapping[str, int], rules: HistoryRules, counts: Counts) -> KnownUser | None:
    """The user in rows of the catalogue, or None where a filter leaves the user out; either way it is counted.

    Raises:
        DataError: an id is not in the catalogue and the policy is ``fail``.
    """
    counts["users_read"] += 1
    if not log.history:
        return _skip("users_with_empty_history", counts)
    history = _known(log.history, log, rows, rules, counts)
    targets = list(dict.fromkeys(_known(log.targets, log, rows, rules, counts)))
    shown = _known(log.shown, log, rows, rules, counts)
    if not targets:
        return _skip("users_without_target", counts)
    if len(history) < rules.min_history:
        return _skip("users_below_min_history", counts)
    if rules.max_history and len(history) > rules.max_history:
        if rules.long_histories == "skip":
            return _skip("users_above_max_history", counts)
        counts["users_with_cut_history"] += 1
    targets = _new_targets(history, targets, rules.repeated_target, counts)
    if not targets:
        return _skip("users_with_repeated_target_dropped", counts)
    return KnownUser(log.user, history, targets, log.time, [row for row in shown if row not in targets])


def with_more_targets(user: KnownUser, num_targets: int, min_history: int) -> KnownUser:
    """The history's latest items join the targets, oldest first, until there are ``num_targets``.

    At least ``min_history`` items, and one, remain; an item that was met before is no target.
    """
    remaining = max(min_history, 1, len(user.history) - max(num_targets - len(user.targets), 0))
    history, moved = user.history[:remaining], user.history[remaining:]
    known = set(history)
    targets = [item for item in dict.fromkeys([*moved, *user.targets]) if item not in known or item in user.targets]
    return replace(user, history=history, targets=targets)


def latest(history: Sequence[int], max_history: int) -> Sequence[int]:
    """The history as the store keeps it: at most ``max_history`` latest items; 0: all."""
    return history[-max_history:] if max_history else history


def _skip(reason: str, counts: Counts) -> None:
    counts[reason] += 1


def _known(
    items: Sequence[str], log: UserLog, rows: Mapping[str, int], rules: HistoryRules, counts: Counts
) -> list[int]:
    known = []
    counts["item_ids_read"] += len(items)
    for item in items:
        row = rows.get(item)
        if row is None:
            if rules.unknown_items == "fail":
                raise DataError(
                    f"{log.source}: user {shown(log.user)} has item {shown(item)}, which the item file lacks; add the "
                    "item, or set data.unknown_items=skip to leave such clicks out and count them"
                )
            counts["clicks_on_unknown_items"] += 1
        elif row == REMOVED:
            counts["clicks_on_items_without_text"] += 1
        else:
            known.append(row)
    return known


def _new_targets(history: list[int], targets: list[int], policy: str, counts: Counts) -> list[int]:
    repeated = set(targets).intersection(history)
    if not repeated:
        return targets
    if policy == "drop":
        counts["repeated_targets_dropped"] += len(repeated)
        return [row for row in targets if row not in repeated]
    counts["users_with_repeated_target_kept"] += 1
    return targets
