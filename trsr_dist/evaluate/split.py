"""The users of a split: their samples with changed prompts, and their rows in the history store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError
from trsr_dist.evaluate.baselines import Ranker
from trsr_dist.evaluate.control import Change, change_sample, derangement
from trsr_dist.evaluate.slices import length_slice
from trsr_dist.records import Sample
from trsr_dist.shards.reader import ShardSet


class SplitUsers:
    """The first users of a split's shards, in order.

    Args:
        shards: of the split.
        max_users: 0: all.
        seed: of the control's derangement.
    """

    def __init__(self, shards: ShardSet, max_users: int, seed: int) -> None:
        self._shards = shards
        self._seed = seed
        self._num_users = min(max_users or len(shards), len(shards))
        self._others: list[int] = []

    def __len__(self) -> int:
        return self._num_users

    def sample(self, index: int, change: Change = "none") -> Sample:
        """A user's sample as the changed prompt shows it."""
        sample = self._shards.read(index)
        other = self._shards.read(self._other(index)) if change == "control" else None
        return change_sample(sample, change, other)

    def cost(self, part: range) -> int:
        """What scoring a part costs, in bytes of text."""
        return int(self._shards.sizes(part.start, part.stop).sum())

    def pairs(self) -> Iterator[tuple[str, list[str], list[int]]]:
        """User, item ids and labels of every sample."""
        for index in range(self._num_users):
            sample = self._shards.read(index)
            yield sample.user, [c.item for c in sample.candidates], [c.label for c in sample.candidates]

    def _other(self, index: int) -> int:
        if not self._others:
            self._others = derangement(self._num_users, self._seed)
        return self._others[index]


@dataclass(frozen=True, slots=True)
class StoredUser:
    """A user of the shards, found again in the history store."""

    row: UserRow
    candidates: list[int]
    """Item rows in the order of the sample's candidates."""


class StoredSplit:
    """Finds the shards' users in the history store.

    Raises:
        DataError: the store has other users or candidates than the shards were made from.
    """

    def __init__(self, store: HistoryStore, split: str) -> None:
        self._store = store
        self._split = split
        self._places = {store.user(split, i).user: i for i in range(store.num_users(split))}

    def find(self, user: str, items: list[str]) -> StoredUser:
        """The row of a user and the item rows of the sample's candidates."""
        if user not in self._places:
            raise self._stale(f"user {user!r} is in the shards only")
        row = self._store.user(self._split, self._places[user])
        ids = {self._store.catalogue.id(item): item for item in row.candidates}
        if sorted(ids) != sorted(items):
            raise self._stale(f"user {user!r} has other candidates in the shards")
        return StoredUser(row, [ids[item] for item in items])

    def _stale(self, what: str) -> DataError:
        return DataError(f"{self._split}: {what} than in the history store; run launch/summarize.py anew")


def rank_all(ranker: Ranker, users: list[StoredUser]) -> list[np.ndarray]:
    """Scores of every user's candidates by a ranker without a language model."""
    return [ranker(user.row.history, user.candidates) for user in users]


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
