"""The users of a split: their samples, with changed prompts and with other candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from trsr_dist.evaluate.control import Change, change_sample, derangement
from trsr_dist.evaluate.protocols import DrawnLists
from trsr_dist.evaluate.stored import StoredUser
from trsr_dist.records import Sample
from trsr_dist.shards.reader import ShardSet


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
        other = self._shards.read(self._other(index)) if change == "control" else None
        return change_sample(sample, change, other)

    def stored(self, protocol: str, index: int) -> StoredUser:
        """A user with the candidates of a protocol, as rows of the history store."""
        return self._lists[protocol].stored(self._shards.read(index).user)

    def cost(self, part: range) -> int:
        """What scoring a part costs, in bytes of text."""
        return int(self._shards.sizes(part.start, part.stop).sum())

    def _other(self, index: int) -> int:
        if not self._others:
            self._others = derangement(self._num_users, self._seed)
        return self._others[index]
