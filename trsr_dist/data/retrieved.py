"""Candidate lists of valid and test users that one's own retriever has made."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from trsr_dist.data.items import REMOVED
from trsr_dist.data.jsonl import Listed
from trsr_dist.data.logs import KnownUser
from trsr_dist.data.ragged import Ragged
from trsr_dist.data.source import Counts, shown
from trsr_dist.errors import DataError


def listed_users(rows: Iterable[Listed], items: Mapping[str, int], unknown_items: str, counts: Counts) -> pa.Table:
    """A unit of the lists' file: users, and what each row names as rows of the catalogue.

    Args:
        rows: of the unit.
        items: rows of the catalogue by id.
        unknown_items: ``fail`` or ``skip``.
        counts: takes the items that are left out.

    Raises:
        DataError: an item is unknown and the policy is ``fail``.
    """
    users, lists = [], []
    for user, ids, place in rows:
        found = array("i")
        for item in ids:
            row = items.get(item)
            if row is None and unknown_items == "fail":
                raise DataError(
                    f"{place}: candidate {shown(item)} of user {shown(user)} is not in the item file; add the "
                    "item, or set data.unknown_items=skip to leave such candidates out and count them"
                )
            if row is None or row == REMOVED:
                counts["candidates_not_in_catalogue"] += 1
            else:
                found.append(row)
        users.append(user)
        lists.append(found)
    return pa.table({"user": pa.array(users, pa.string()), "items": Ragged.from_lists(lists).arrow()})


class RetrievedLists:
    """The lists of some users; what the file says of train users is not used.

    Args:
        path: of the file.
        batches: of ``listed_users``, in the file's order; further rows of a user add to the list.
        missed_targets: ``add`` or ``skip``, see ``negatives``.
        id_of: of a row of the catalogue.

    Raises:
        DataError: an item stands twice in a list.
    """

    def __init__(
        self, path: Path, batches: Iterable[pa.RecordBatch], missed_targets: str, id_of: Callable[[int], object]
    ) -> None:
        self._skips_missed = missed_targets == "skip"
        self._lists: dict[str, array] = {}
        for batch in batches:
            for user, items in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                self._lists.setdefault(user, array("i")).extend(items)
        for user, found in self._lists.items():
            if len(set(found)) < len(found):
                twice = next(row for place, row in enumerate(found) if row in found[:place])
                item = str(id_of(twice))
                raise DataError(f"{path}: user {shown(user)} has candidate {shown(item)} twice; remove one of the two")

    def negatives(self, user: KnownUser, split: str, counts: Counts) -> list[int] | None:
        """The user's candidates beside targets and history; None: the user is left out, since a target is missed."""
        found = self._lists.get(user.user, array("i"))
        excluded = {*user.targets, *user.history}
        negatives = [row for row in found if row not in excluded]
        if not set(user.targets) <= set(found):
            # To a list without other candidates no target is added: its user is left out, see data.too_few_negatives.
            counts[f"{split}_users_with_missed_target"] += self._skips_missed or bool(negatives)
            if self._skips_missed:
                return None
        counts["candidates_in_a_history"] += len(set(found).difference(negatives, user.targets))
        return negatives
