"""Candidate lists beside the shards' own, for the same users: drawn from the history store, equal for equal seeds."""

from __future__ import annotations

import numpy as np

from trsr_dist.data.candidates import draw_negatives, pools_of
from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError
from trsr_dist.evaluate.stored import StoredSplit, StoredUser
from trsr_dist.hashing import random_stream
from trsr_dist.records import Candidate

HELD_OUT = ("valid", "test")
NEVER = np.iinfo(np.int64).max


class DrawnLists:
    """One protocol's candidate list of any user of a split.

    Args:
        protocol: ``uniform`` over the catalogue, by ``popularity`` among held-out users, or their ``targets``.
        store: histories and items.
        split: finds the users.
        num_negatives: per positive.
        seen_before_target: only items that someone had met before the user's target.
        seed: of the draws and the order.
    """

    def __init__(
        self,
        protocol: str,
        store: HistoryStore,
        split: StoredSplit,
        num_negatives: int,
        seen_before_target: bool,
        seed: int,
    ) -> None:
        self._protocol = protocol
        self._store = store
        self._split = split
        self._num_negatives = num_negatives
        self._seed = seed
        first_seen = first_times(store) if seen_before_target else None
        categories = store.catalogue.categories() if store.within_category else None
        self._pool_of = pools_of(item_weights(protocol, store), first_seen, categories)

    def stored(self, user: str) -> StoredUser:
        """The user's row and the rows of the drawn candidates, shuffled.

        Raises:
            DataError: too few items are eligible, or the store does not know the user.
        """
        row = self._split.row(user)
        targets = targets_of(row)
        stream = random_stream(self._seed, user, "protocol", self._protocol)
        wanted = self._num_negatives * len(targets)
        negatives = draw_negatives(self._pool_of, targets, set(row.history), wanted, stream, row.time)
        if len(negatives) < wanted:
            raise DataError(
                f"user {user!r}: {len(negatives)} items are eligible as negatives of protocol {self._protocol}, "
                f"{wanted} are needed; lower evaluate.negatives_per_positive or change evaluate.protocols"
            )
        return StoredUser(row, stream.sample(targets + negatives, len(targets) + wanted))

    def candidates(self, user: str) -> tuple[Candidate, ...]:
        """The drawn list as a sample holds it."""
        found = self.stored(user)
        targets, catalogue = set(targets_of(found.row)), self._store.catalogue
        return tuple(Candidate(catalogue.id(i), catalogue.text(i), int(i in targets)) for i in found.candidates)


def item_weights(protocol: str, store: HistoryStore) -> np.ndarray:
    """How likely each item is drawn, as in the preparation: float64, shape (num_items,)."""
    if protocol == "uniform":
        return np.ones(len(store.catalogue))
    columns = ("history", "targets") if protocol == "popularity" else ("targets",)
    return sum(store.count_items(split, column) for split in HELD_OUT for column in columns).astype(np.float64)


def first_times(store: HistoryStore) -> np.ndarray:
    """When each item is first known to have been met, int64 seconds; the largest int64 where never."""
    times = store.catalogue.first_times()
    return np.where(times == 0, NEVER, times)


def targets_of(row: UserRow) -> list[int]:
    """A user's targets, item rows."""
    return [item for item, label in zip(row.candidates, row.labels, strict=True) if label]
