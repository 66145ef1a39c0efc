"""The second pass: order and split the users, count clicks, draw candidates, write the store."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trsr_dist.data.candidates import (
    DRAWS_PER_ROUND,
    PoolOf,
    clicks_of,
    draw_negatives,
    draw_shown,
    pools_of,
)
from trsr_dist.data.logs import KnownUser, UserColumns
from trsr_dist.data.parts import hash64_many
from trsr_dist.data.ragged import Ragged
from trsr_dist.data.retrieved import RetrievedLists
from trsr_dist.data.samples import Samples
from trsr_dist.data.source import BLOCK_BYTES, Counts, shown
from trsr_dist.data.store import ITEM_SCHEMA, ROWS_PER_BATCH, USER_SCHEMA, ArrowRows, ArrowWriter
from trsr_dist.errors import DataError
from trsr_dist.hashing import random_stream
from trsr_dist.run import SPLITS

MOST_AT_ONCE = 256
"""Negatives of a user that are drawn for many users at once."""
Made = tuple[list[int], list[int]]
"""Candidates and labels of a user."""


@dataclass(frozen=True, slots=True)
class CandidateRules:
    """How candidate lists are made; the settings of the same names, and run.seed."""

    strategy: str
    within_category: bool
    """Negatives have the target's category: of news, or the locale where a catalogue holds several."""
    seen_before_target: bool
    split_by: str
    too_few_negatives: str
    pool_size: int
    train_negatives: int
    """Negatives per positive that training draws from the pool: a pool may not be smaller."""
    evaluation_negatives: int
    """Negatives per positive of a valid or test user."""
    seed: int

    def wanted(self, split: str, num_targets: int) -> tuple[int, int]:
        """Negatives to draw for a user, and the fewest that will do."""
        if split == "train":
            least = self.train_negatives * num_targets
            return max(self.pool_size, least), least
        return self.evaluation_negatives * num_targets, self.evaluation_negatives * num_targets


def check_times(times: np.ndarray, setting: str) -> None:
    """Refuse a setting that needs times where the data has none.

    Raises:
        DataError: names the setting.
    """
    without = int((times == 0).sum())
    if without:
        raise DataError(
            f"{setting} needs the time of every user's target, and {without} of {len(times)} users have none; give the "
            "times, or choose another value"
        )


def write_items(path: Path, items: ArrowRows, popularity: np.ndarray, first_seen: np.ndarray) -> None:
    """The catalogue: the spooled columns and what was counted over the users."""
    start = 0
    with ArrowWriter(path, ITEM_SCHEMA) as writer:
        for batch in items.batches:
            rows = slice(start, start + batch.num_rows)
            writer.add_batch([*batch.columns, pa.array(popularity[rows]), pa.array(first_seen[rows])])
            start += batch.num_rows


class CandidateMaker:
    """Draws the candidate list of any user.

    Args:
        rules: how.
        times: int64 [users], of all users.
        clicks: int64 [splits, 2, items], see ``count_clicks``.
        items: the spooled catalogue.
        first_seen: int64 [items], see ``UserColumns.first_seen``.

    Attributes:
        retrieved: lists of the valid and test users that come next; None: they are drawn too.
    """

    def __init__(
        self,
        rules: CandidateRules,
        times: np.ndarray,
        clicks: np.ndarray,
        items: ArrowRows,
        first_seen: np.ndarray,
    ) -> None:
        self._rules = rules
        self.retrieved: RetrievedLists | None = None
        self._pools: dict[str, PoolOf] = {}
        seen, categories = None, None
        if rules.seen_before_target:
            check_times(times, "data.seen_before_target=true")
            seen = first_seen
        if rules.within_category:
            categories = items.strings("category")
            if not any(categories):
                raise DataError("data.candidates=category, and no item has a category; choose another strategy")
        if rules.strategy not in ("popularity", "targets"):
            self._pools = dict.fromkeys(SPLITS, pools_of(np.ones(len(items)), seen, categories))
            return
        for splits in {clicks_of(split, rules.split_by) for split in SPLITS}:
            columns = clicks[[SPLITS.index(split) for split in splits]].sum(axis=0)
            pool = pools_of(columns[1] if rules.strategy == "targets" else columns.sum(axis=0), seen, categories)
            self._pools |= dict.fromkeys(splits, pool)

    def make_all(self, users: UserColumns, split: str, counts: Counts) -> tuple[Ragged, Ragged]:
        """Candidates and labels of many users; none where one is skipped for want of negatives.

        Most users have one target, and what is drawn first for them is neither drawn twice nor their own: that is done
        for all of them at once. The others, and whatever is wrong, are left to ``make``.
        """
        wanted, _ = self._rules.wanted(split, 1)
        drawn, is_plain = self._first_draws(users, split, wanted)
        candidates = np.concatenate([users.targets.values[users.targets.ends[:-1], None], drawn], axis=1)
        labels = np.zeros(candidates.shape, np.int8)
        labels[:, 0] = 1
        if split != "train" and is_plain.any():
            orders = self._orders(users.names.filter(pa.array(is_plain)), wanted)
            for matrix in (candidates, labels):
                matrix[is_plain] = np.take_along_axis(matrix[is_plain], orders, axis=1)
        counts["users_with_small_pool"] += 0  # the manifest says also that there are none
        others = [self.make(users.user(place), split, counts) for place in np.flatnonzero(~is_plain)]
        lists = zip(*(made or ([], []) for made in others), strict=True) if others else ([], [])
        return tuple(
            _merged(matrix, is_plain, Ragged.from_lists(made))
            for matrix, made in zip((candidates, labels), lists, strict=True)
        )

    def _first_draws(self, users: UserColumns, split: str, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [users, wanted], negatives, and bool [users]: whose these are; the others' mean nothing."""
        drawn, is_plain = np.zeros((len(users), wanted), np.int64), np.zeros(len(users), bool)
        is_retrieved = split != "train" and self.retrieved is not None
        if self._rules.strategy == "impressions" or wanted > MOST_AT_ONCE or is_retrieved:
            return drawn[:, :0], is_plain
        names, members, single = users.names.to_pylist(), defaultdict(list), users.targets.lengths == 1
        targets = users.targets.values[users.targets.ends[:-1][single]]
        for place, target in zip(np.flatnonzero(single).tolist(), targets.tolist(), strict=True):
            pool = self._pools[split](target)
            if pool is not None:
                members[pool].append(place)
        for pool, places in members.items():
            seeds = self._seeds([names[place] for place in places])
            drawn[places], is_plain[places] = pool.first_draws(seeds, wanted, users.times[places])
        clashes = is_plain & _clashes(users, drawn)
        is_plain &= ~clashes
        for pool, members_of in members.items():
            places = [place for place in members_of if clashes[place]]
            seeds = self._seeds([names[place] for place in places])
            rows, is_enough = pool.first_draws(seeds, DRAWS_PER_ROUND * wanted, users.times[places])
            for place, row, enough in zip(places, rows.tolist(), is_enough.tolist(), strict=True):
                own = {*users.history.list(place), *users.targets.list(place)}
                found = [item for item in dict.fromkeys(row) if item not in own][:wanted]
                if enough and len(found) == wanted:  # as ``draw`` after its first round
                    drawn[place], is_plain[place] = found, True
        return drawn, is_plain

    def _orders(self, names: pa.Array, wanted: int) -> np.ndarray:
        """How ``make`` shuffles a plain user's candidates, int64 [users, wanted + 1]."""
        orders, stream = [], Random()
        for seed in self._seeds(names.to_pylist()):
            stream.seed(seed)
            stream.getrandbits(64 * DRAWS_PER_ROUND * wanted)  # what the draw takes from the stream
            orders.append(stream.sample(range(wanted + 1), wanted + 1))
        return np.array(orders)

    def _seeds(self, names: Sequence[str]) -> list[int]:
        """Of users' random streams."""
        return hash64_many(names, before=[self._rules.seed], after=["negatives"]).tolist()

    def make(self, user: KnownUser, split: str, counts: Counts) -> Made | None:
        """Candidates and labels; None where the user is skipped for want of negatives, or of a retrieved target.

        Raises:
            DataError: too few eligible items, and the policy is ``fail``.
        """
        stream = random_stream(self._rules.seed, user.user, "negatives")
        if split != "train" and self.retrieved is not None:
            wanted = least = 1
            negatives = self.retrieved.negatives(user, split, counts)
            if negatives is None:
                return None
            problem = "data.candidates_file names no candidate of this user beside targets and history; add some"
        else:
            wanted, least = self._rules.wanted(split, len(user.targets))
            negatives = self._draw(user, split, wanted, stream)
            key = "train.negatives_per_positive" if split == "train" else "evaluate.negatives_per_positive"
            problem = (
                f"{len(negatives)} catalogue items are eligible as negatives (data.candidates={self._rules.strategy}), "
                f"{least} are needed; lower {key}, choose another strategy"
            )
        if len(negatives) < least:
            if self._rules.too_few_negatives == "fail":
                raise DataError(f"{split} user {shown(user.user)}: {problem}, or set data.too_few_negatives=skip")
            counts["users_with_too_few_negatives"] += 1
            return None
        counts["users_with_small_pool"] += len(negatives) < wanted
        candidates = user.targets + negatives
        labels = [1] * len(user.targets) + [0] * len(negatives)
        if split != "train":
            order = stream.sample(range(len(candidates)), len(candidates))
            candidates, labels = [candidates[i] for i in order], [labels[i] for i in order]
        return candidates, labels

    def _draw(self, user: KnownUser, split: str, count: int, stream: Random) -> list[int]:
        history = set(user.history)
        if self._rules.strategy == "impressions":
            return draw_shown(user.shown, user.targets, history, count, stream)
        return draw_negatives(self._pools[split], user.targets, history, count, stream, user.time)


def _clashes(users: UserColumns, drawn: np.ndarray) -> np.ndarray:
    """bool [users]: whether a row is drawn twice, or is one of the user's own items."""
    size = 1 + max(int(column.max(initial=0)) for column in (users.history.values, users.targets.values, drawn))
    found = np.sort(drawn + size * np.arange(len(users))[:, None], axis=1)
    own = np.sort(np.concatenate([size * column.owners + column.values for column in (users.history, users.targets)]))
    places = np.minimum(np.searchsorted(own, found.ravel()), len(own) - 1)
    is_own = (own[places] == found.ravel()).reshape(found.shape)
    return is_own.any(axis=1) | (found[:, 1:] == found[:, :-1]).any(axis=1)


def _merged(matrix: np.ndarray, is_plain: np.ndarray, others: Ragged) -> Ragged:
    """Rows of the matrix where ``is_plain``, else the next of the other lists."""
    lengths = np.full(len(is_plain), matrix.shape[1])
    lengths[~is_plain] = others.lengths
    values, from_matrix = np.empty(lengths.sum(), np.int32), np.repeat(is_plain, lengths)
    values[from_matrix], values[~from_matrix] = matrix[is_plain].ravel(), others.values
    return Ragged.of(values, lengths)


def write_split(
    folder: Path, split: str, samples: Samples, maker: CandidateMaker, max_history: int, counts: Counts
) -> dict[str, int]:
    """Write a part of a split's samples, and what the hash of all candidate lists is taken of; returns the part's
    facts: users, items, positives."""
    facts = {"users": 0, "history_items": 0, "candidates": 0, "positives": 0}
    with ArrowWriter(folder / f"{split}.arrow", USER_SCHEMA) as writer, open(folder / f"{split}.lists", "wb") as lists:
        for start in range(0, len(samples.users), ROWS_PER_BATCH):
            rows = np.arange(start, min(start + ROWS_PER_BATCH, len(samples.users)))
            found, lengths = samples.users.take(rows), samples.lengths[rows]
            candidates, labels = maker.make_all(found, split, counts)
            kept = np.flatnonzero(candidates.lengths)
            found, candidates, labels = found.take(kept), candidates.take(kept), labels.take(kept)
            history = found.history.first(lengths[kept]).latest(max_history)
            columns = [column.arrow() for column in (history, candidates, labels)]
            writer.add_columns([found.names.cast(pa.string()), *columns, pa.array(found.times)])
            lists.write(_as_json(found.names, candidates, labels))
            facts["users"] += len(kept)
            facts["history_items"] += len(history.values)
            facts["candidates"] += len(candidates.values)
            facts["positives"] += int(labels.values.sum())
    return facts


def join_split(folder: Path, split: str, parts: Sequence[Path], facts: Sequence[dict[str, int]]) -> dict[str, object]:
    """Write a split of all parts, in their order, and return its facts and the hash of all candidate lists."""
    candidate_hash = hashlib.sha256()
    with ArrowWriter(folder / f"{split}.arrow", USER_SCHEMA) as writer:
        for part in parts:
            for batch in ArrowRows(part / f"{split}.arrow").batches:
                writer.add_columns(batch.columns)
            with open(part / f"{split}.lists", "rb") as lists:
                while block := lists.read(BLOCK_BYTES):
                    candidate_hash.update(block)
    total = {name: sum(part[name] for part in facts) for name in facts[0]}
    return {**total, "candidate_hash": candidate_hash.hexdigest()}


def _as_json(names: pa.Array, candidates: Ragged, labels: Ragged) -> bytes:
    """What ``json.dumps`` makes of each user's name, candidates and labels, in a fifth of its time."""
    numbers = (
        pc.binary_join(
            pa.ListArray.from_arrays(column.arrow().offsets, pa.array(column.values).cast(pa.string())), ", "
        )
        for column in (candidates, labels)
    )
    texts = zip(map(json.dumps, names.to_pylist()), *(column.to_pylist() for column in numbers), strict=True)
    return "".join(f"[{name}, [{items}], [{values}]]" for name, items, values in texts).encode()
