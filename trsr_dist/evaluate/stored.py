"""A split's users in the history store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError
from trsr_dist.evaluate.baselines import Ranker
from trsr_dist.evaluate.slices import length_slice
from trsr_dist.records import Sample


@dataclass(frozen=True, slots=True)
class StoredUser:
    """A user of the shards, found again in the history store."""

    row: UserRow
    candidates: list[int]
    """Item rows in the order in which they are scored."""


class StoredSplit:
    """Finds the shards' users in the history store.

    Raises:
        DataError: the store has other users or candidates than the shards were made from.
    """

    def __init__(self, store: HistoryStore, split: str) -> None:
        self._store = store
        self._split = split
        self._places = {user: place for place, user in enumerate(store.names(split))}

    def row(self, user: str) -> UserRow:
        """A user's row."""
        if user not in self._places:
            raise self._stale(f"user {user!r} of the shards is not in the history store")
        return self._store.user(self._split, self._places[user])

    def stored(self, user: str) -> StoredUser:
        """A user with the prepared candidates."""
        row = self.row(user)
        return StoredUser(row, row.candidates)

    def find(self, user: str, items: list[str]) -> StoredUser:
        """The row of a user and the item rows of the sample's candidates."""
        row = self.row(user)
        ids = {self._store.catalogue.id(item): item for item in row.candidates}
        if sorted(ids) != sorted(items):
            raise self._stale(f"user {user!r} has other candidates in the shards than in the history store")
        return StoredUser(row, [ids[item] for item in items])

    def _stale(self, what: str) -> DataError:
        return DataError(f"{self._split}: {what}; run launch/summarize.py again")


def labels_of(user: StoredUser) -> list[int]:
    """Of the candidates: 1 for a target, 0 for a negative."""
    labels = dict(zip(user.row.candidates, user.row.labels, strict=True))
    return [labels.get(item, 0) for item in user.candidates]


def rank_all(ranker: Ranker, users: Sequence[StoredUser]) -> list[np.ndarray]:
    """Scores of every user's candidates by a ranker without a language model."""
    return ranker([user.row.history for user in users], [user.candidates for user in users])


def user_facts(store: HistoryStore, sample: Sample, user: StoredUser, trims: dict[str, int]) -> dict[str, str]:
    """What the slices tell users apart by."""
    targets = [item for item, candidate in zip(user.candidates, sample.candidates, strict=True) if candidate.label]
    category = store.catalogue.category(targets[0])
    facts = {
        "history length": length_slice(len(user.row.history)),
        "summary scheme": str(sample.provenance.get("scheme", "unknown")),
        "trimmed": "yes" if trims else "no",
        "target": "cold" if not any(store.catalogue.popularity(item) for item in targets) else "seen in training",
    }
    return facts | ({"category": category} if category else {})
