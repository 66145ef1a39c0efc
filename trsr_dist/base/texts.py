"""The texts of a run's train users, from their samples and the histories that those were made of."""

from __future__ import annotations

from pathlib import Path

from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.records import Sample
from trsr_dist.run import check_inputs
from trsr_dist.shards.reader import ShardSet


class ShardTexts:
    """Reads whatever is asked for; holds the ids of the catalogue in memory.

    Args:
        histories: ``RUN/histories``.
        shards: ``RUN/shards/train``.

    Raises:
        RunError: one of them is not there, or the shards were made from other histories.
        DataError: there is no train user.
    """

    def __init__(self, histories: Path, shards: Path) -> None:
        store = HistoryStore(histories)
        self._catalogue = store.catalogue
        self._shards = ShardSet(shards)
        self.inputs = {"histories": store.manifest_hash, "train": self._shards.manifest_hash}
        check_inputs(shards, {"histories": store.manifest_hash})
        if not len(self._shards):
            raise DataError(f"{shards}: no train user to take texts from; give data.split a share for train")
        self._rows = {item: row for row, item in enumerate(self._catalogue.numbers())}

    def __len__(self) -> int:
        """Number of train users."""
        return len(self._shards)

    def sample(self, user: int) -> Sample:
        """A train user's sample."""
        return self._shards.read(user)

    def history(self, sample: Sample) -> list[str]:
        """Item texts of the sample's user, oldest first, without the target."""
        return [self._catalogue.text(self._rows[item]) for item in sample.provenance["history"]]
