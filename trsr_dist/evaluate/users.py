"""The users of a split: samples, with changed prompts and other candidates, and their rows in the history store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trsr_dist.data.candidates import HELD_OUT, draw_negatives, pools_of
from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError
from trsr_dist.evaluate.passes import Change
from trsr_dist.hashing import random_stream
from trsr_dist.records import Candidate, Sample
from trsr_dist.shards.codec import Outline
from trsr_dist.shards.reader import ShardSet

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class StoredUser:
    """A user of the shards, found again in the history store."""

    row: UserRow
    candidates: list[int]
    """Item rows in the order in which they are scored."""

    def labels(self) -> list[int]:
        """Of the candidates: 1 for a target, 0 for a negative."""
        known = dict(zip(self.row.candidates, self.row.labels, strict=True))
        return [known.get(item, 0) for item in self.candidates]


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
        row, known = self.row(user), self._store.catalogue.ids
        if [known[item] for item in row.candidates] == items:
            return StoredUser(row, row.candidates)
        ids = {known[item]: item for item in row.candidates}
        if len(ids) != len(items) or ids.keys() != set(items):
            raise self._stale(f"user {user!r} has other candidates in the shards than in the history store")
        return StoredUser(row, [ids[item] for item in items])

    def _stale(self, what: str) -> DataError:
        return DataError(f"{self._split}: {what}; run launch/summarize.py again")


class DrawnLists:
    """One protocol's candidate list of any user of a split.

    Args:
        protocol: ``uniform`` over the catalogue, by ``popularity`` among held-out users, or their ``targets``.
        store: histories and items.
        split: finds the users.
        num_negatives: per positive.
        seen_before_target: only items that someone had met before the user's target.
        seed: of the draws and the order.
        clicks_of: splits whose users' clicks or targets are drawn from.
    """

    def __init__(
        self,
        protocol: str,
        store: HistoryStore,
        split: StoredSplit,
        num_negatives: int,
        seen_before_target: bool,
        seed: int,
        clicks_of: Sequence[str] = HELD_OUT,
    ) -> None:
        self._protocol = protocol
        self._store = store
        self._split = split
        self._num_negatives = num_negatives
        self._seed = seed
        first_seen = first_times(store) if seen_before_target else None
        categories = store.catalogue.strings("category") if store.within_category else None
        self._pool_of = pools_of(item_weights(protocol, store, clicks_of), first_seen, categories)

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


def item_weights(protocol: str, store: HistoryStore, clicks_of: Sequence[str]) -> np.ndarray:
    """How likely each item is drawn, as in the preparation: float64, shape (num_items,)."""
    if protocol == "uniform":
        return np.ones(len(store.catalogue))
    columns = ("history", "targets") if protocol == "popularity" else ("targets",)
    return sum(store.count_items(split, column) for split in clicks_of for column in columns).astype(np.float64)


def first_times(store: HistoryStore) -> np.ndarray:
    """When each item is first known to have been met, int64 seconds; the largest int64 where never."""
    times = store.catalogue.column("first_seen")
    return np.where(times == 0, NEVER, times)


def targets_of(row: UserRow) -> list[int]:
    """A user's targets, item rows."""
    return [item for item, label in zip(row.candidates, row.labels, strict=True) if label]


def derangement(num_users: int, seed: int) -> list[int]:
    """For each user another one: a random cycle through all users, so that nobody keeps the own text.

    Raises:
        DataError: there are fewer than two users.
    """
    if num_users < 2:
        raise DataError(
            f"the control needs another user's text, so at least 2 users, and there are {num_users}; raise "
            "evaluate.max_users or prepare more data"
        )
    order = list(range(num_users))
    random_stream(seed, "control").shuffle(order)
    others = [0] * num_users
    for user, other in zip(order, order[1:] + order[:1], strict=True):
        others[user] = other
    return others


def change_sample(sample: Sample, change: Change, other: Sample | None = None) -> Sample:
    """The sample as the changed prompt shows it; candidates and labels stay.

    Args:
        sample: the user.
        change: ``control``: the summary and recent items of ``other``; ``no_summary``, ``no_recent``: without them.
        other: needed by the control.
    """
    if change == "control":
        assert other is not None
        return replace(sample, summary=other.summary, recent=other.recent)
    if change == "no_summary":
        return replace(sample, summary="")
    if change == "no_recent":
        return replace(sample, recent=())
    return sample


class SplitUsers:
    """The first users of a split's shards, in order.

    Args:
        shards: of the split.
        max_users: 0: all.
        seed: of the control's derangement.
        lists: further candidate lists, by protocol.
    """

    def __init__(self, shards: ShardSet, max_users: int, seed: int, lists: Mapping[str, DrawnLists]) -> None:
        self._shards = shards
        self._seed = seed
        self._lists = lists
        self._num_users = min(max_users or len(shards), len(shards))
        self._others: list[int] = []

    def __len__(self) -> int:
        return self._num_users

    @property
    def candidate_hash(self) -> str:
        """Of the shards' own lists."""
        return self._shards.candidate_hash

    def sample(self, index: int, change: Change = "none", protocol: str = "") -> Sample:
        """A user's sample as the changed prompt shows it, with the candidates of a protocol (empty: its own)."""
        sample = self._shards.read(index)
        if protocol:
            sample = replace(sample, candidates=self._lists[protocol].candidates(sample.user))
        if change != "control":
            return change_sample(sample, change)
        if not self._others:
            self._others = derangement(self._num_users, self._seed)
        return change_sample(sample, change, self._shards.read(self._others[index]))

    def outline(self, index: int) -> Outline:
        """A user's sample, which has been scored before, without its texts."""
        return self._shards.outline(index)

    def stored(self, protocol: str, index: int) -> StoredUser:
        """A user with the candidates of a protocol, as rows of the history store."""
        return self._lists[protocol].stored(self.outline(index).user)

    def cost(self, part: range) -> int:
        """What scoring a part costs, in bytes of text."""
        return int(self._shards.sizes(part.start, part.stop).sum())
