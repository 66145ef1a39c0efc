"""Which samples a user gives: targets, and where the history is cut before them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from trsr_dist.data.logs import AFTER_ALL, KnownUser, UserColumns
from trsr_dist.data.parts import hash64_many
from trsr_dist.data.shared import OrderedError
from trsr_dist.data.source import shown
from trsr_dist.data.store import EARLIER
from trsr_dist.run import SPLITS


@dataclass(frozen=True, slots=True)
class SampleRules:
    """The settings of the same names in the data section."""

    train_targets: int
    train_prefixes: int
    min_history: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Of several users, in the order of their keys' hashes."""

    users: UserColumns
    """A row each. The history of an earlier sample holds all that the user met, since none of it may be a negative."""
    lengths: np.ndarray
    """int64 [samples]: items of the history before the targets, which are all that a prompt reads."""
    splits: np.ndarray
    """int8 [samples], indices into SPLITS."""

    @classmethod
    def of(cls, users: UserColumns, splits: np.ndarray, rules: SampleRules) -> Samples:
        """One sample of each valid or test user, of train users those that the rules ask for."""
        if rules.train_targets == rules.train_prefixes == 1:
            return cls(users, users.history.lengths, splits)
        rows: list[KnownUser] = []
        lengths, owners = [], []
        for place in range(len(users)):
            found = [users.user(place)]
            if splits[place] == SPLITS.index("train"):
                found[0] = with_more_targets(found[0], rules.train_targets, rules.min_history)
                found += earlier_samples(found[0], rules.train_prefixes - 1, rules.train_targets, rules.min_history)
            everything = [*found[0].history, *found[0].targets]
            lengths += [len(sample.history) for sample in found]
            owners += [place] * len(found)
            rows += [found[0], *(replace(sample, history=everything) for sample in found[1:])]
        order = np.argsort(hash64_many(row.user for row in rows), kind="stable")
        taken = UserColumns.from_users(rows).take(order)
        return cls(taken, np.array(lengths, np.int64)[order], splits[np.array(owners, np.int64)[order]])

    def take(self, rows: np.ndarray) -> Samples:
        """Some of them (int64)."""
        return Samples(self.users.take(rows), self.lengths[rows], self.splits[rows])


def count_clicks(users: UserColumns, splits: np.ndarray, samples: Samples, num_items: int) -> np.ndarray:
    """int64 [splits, 2, items]: of a split's users, how often they met each item, and as which: in the history alone,
    or as a target of a sample."""
    found = []
    for place in range(len(SPLITS)):
        met = sum(users.count(column, splits == place, num_items) for column in ("history", "targets"))
        targets = samples.users.count("targets", samples.splits == place, num_items)
        found.append([met - targets, targets])
    return np.array(found)


def with_more_targets(user: KnownUser, num_targets: int, min_history: int) -> KnownUser:
    """The history's latest items join the targets, oldest first, until there are ``num_targets``.

    At least ``min_history`` items, and one, remain; an item that was met before is no target.
    """
    remaining = max(min_history, 1, len(user.history) - max(num_targets - len(user.targets), 0))
    history, moved = user.history[:remaining], user.history[remaining:]
    known = set(history)
    targets = [item for item in dict.fromkeys([*moved, *user.targets]) if item not in known or item in user.targets]
    return replace(user, history=history, targets=targets)


def earlier_samples(user: KnownUser, num_samples: int, num_targets: int, min_history: int) -> list[KnownUser]:
    """The same user before the history ended: each sample's targets are the latest items that the one before it read.

    Args:
        user: as ``with_more_targets`` left it.
        num_samples: at most; they end where fewer than ``min_history`` items, or none, would remain.
        num_targets: at most, of each.
        min_history: items.

    Returns:
        latest first, with keys of their own, see ``EARLIER``. A sample without targets, all met before, is left out.
    """
    found: list[KnownUser] = []
    left = user
    while len(found) < num_samples:
        name, before = f"{user.user}~{len(found) + 1}", len(left.history)
        left = with_more_targets(replace(left, user=name, targets=[]), num_targets, min_history)
        if len(left.history) == before:
            break
        found += [left] if left.targets else []
    return found


def check_keys(users: UserColumns) -> None:
    """Refuse a user whose key is like that of an earlier sample.

    Raises:
        OrderedError: names the user.
    """
    for name in users.names.to_pylist():
        if re.search(EARLIER, name):
            raise OrderedError(
                AFTER_ALL,
                f"user {shown(name)}: a key that ends in ~ and a number is that of an earlier sample under "
                "data.train_prefixes above 1; name the user otherwise, or set it to 1",
            )
