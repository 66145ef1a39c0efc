"""Who is a train, valid or test user, and which negatives a user gets: weighted draws without replacement that never
hit the user's own items. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from trsr_dist.data.parts import hash64_many

HELD_OUT = ("valid", "test")
DRAWS_PER_ROUND = 2
"""Per wanted item: few are excluded or drawn twice."""
MAX_ROUNDS = 16


def split_by_user(users: Sequence[str], shares: Sequence[int]) -> np.ndarray:
    """int8 [users], indices into ``SPLITS`` from a hash of the key: who else is there does not matter.

    The hash is salted, so that it is independent of the one that orders the users.
    """
    points = hash64_many(users, before=["split"]) % np.uint64(sum(shares))
    return np.searchsorted(np.cumsum(shares), points, side="right").astype(np.int8)


def clicks_of(split: str, split_by: str) -> tuple[str, ...]:
    """Splits whose users' clicks or targets the negatives of a split are drawn from.

    Train users draw by train clicks, the others by held-out clicks. Then positives and negatives of a split come from
    the same clicks, and popularity, which is counted over train users, does not set them apart; by train clicks alone,
    held-out negatives would be those that chance made popular in train. Nor is a test target trained on as a negative.
    Splits of different times do not share clicks: the positives of test would be newer than its negatives, and those of
    valid older.
    """
    return (split,) if split == "train" or split_by == "time" else HELD_OUT


def split_by_time(times: np.ndarray, hashes: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """int8 [users], indices into ``SPLITS``: the latest targets are test, those before valid; equal times by hash."""
    order = np.lexsort((hashes, times))
    ends = np.cumsum(shares) * len(times) // sum(shares)
    splits = np.empty(len(times), np.int8)
    splits[order] = np.searchsorted(ends, np.arange(len(times)), side="right")
    return splits


class ItemPool:
    """Items that may be drawn, each with a weight.

    Args:
        rows: int64 [items], rows of the catalogue.
        weights: float64 or int64 [items], not negative; items of weight 0 are never drawn.
        first_seen: int64 [items], seconds; with it a draw can be limited to items seen before a time.
    """

    def __init__(self, rows: np.ndarray, weights: np.ndarray, first_seen: np.ndarray | None = None) -> None:
        kept = np.flatnonzero(weights)
        if first_seen is not None:
            kept = kept[np.argsort(first_seen[kept], kind="stable")]
        self._rows = rows[kept]
        self._weights = weights[kept].astype(np.float64)
        self._cumulative = np.cumsum(self._weights)
        self._first_seen = None if first_seen is None else first_seen[kept]

    def draw(self, count: int, excluded: AbstractSet[int], stream: random.Random, before: int = 0) -> list[int]:
        """``count`` different rows outside ``excluded``, or all there are where they are fewer.

        Args:
            count: rows wanted.
            excluded: rows that may not be drawn.
            stream: the user's own random stream.
            before: seconds; only items first seen before it, where the pool knows the times.
        """
        limit = len(self._rows)
        if self._first_seen is not None:
            limit = int(np.searchsorted(self._first_seen, before, side="left"))
        count = min(count, limit)
        if not count:
            return []
        drawn: dict[int, None] = {}
        for _ in range(MAX_ROUNDS):
            points = np.array([stream.random() for _ in range(DRAWS_PER_ROUND * count)]) * self._cumulative[limit - 1]
            places = np.searchsorted(self._cumulative[:limit], points, side="right")
            for row in self._rows[np.minimum(places, limit - 1)].tolist():
                if row not in excluded:
                    drawn[row] = None
                    if len(drawn) == count:
                        return list(drawn)
        # Rejection finds too little: look at every item (Efraimidis and Spirakis, 2006: keys of weights).
        keys = []
        for row, weight in zip(self._rows[:limit].tolist(), self._weights[:limit].tolist(), strict=True):
            if row not in excluded and row not in drawn:
                keys.append((stream.random() ** (1 / weight), row))
        keys.sort(reverse=True)
        return [*drawn, *(row for _, row in keys[: count - len(drawn)])]

    def first_draws(self, seeds: Sequence[int], count: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What ``draw`` draws first for many users.

        Args:
            seeds: of the users' streams.
            count: rows wanted.
            before: int64 [users], seconds.

        Returns:
            int64 [users, count], rows, and bool [users]: whether the pool has as many for the user; otherwise the rows
            mean nothing.
        """
        limits = np.full(len(seeds), len(self._rows))
        if self._first_seen is not None:
            limits = np.searchsorted(self._first_seen, before, side="left")
        last, is_enough = np.maximum(limits, 1) - 1, limits >= count
        if not is_enough.any():
            return np.zeros((len(seeds), count), np.int64), is_enough
        points = first_numbers(seeds, count) * self._cumulative[last][:, None]
        places = np.searchsorted(self._cumulative, points, side="right")
        return self._rows[np.minimum(places, last[:, None])], is_enough


def first_numbers(seeds: Sequence[int], count: int) -> np.ndarray:
    """The first ``count`` results of ``random.Random(seed).random()``, float64 [seeds, count].

    It makes a number of 27 and 26 bits of two words (Matsumoto and Nishimura, 1998).
    """
    stream, words = random.Random(), []
    for seed in seeds:
        stream.seed(seed)
        words.append(stream.getrandbits(64 * count).to_bytes(8 * count, "little"))
    pairs = np.frombuffer(b"".join(words), "<u4").reshape(len(seeds), count, 2)
    return ((pairs[:, :, 0] >> 5) * 2.0**26 + (pairs[:, :, 1] >> 6)) / 2.0**53


PoolOf = Callable[[int], ItemPool | None]


def category_pools(
    categories: Sequence[str], weights: np.ndarray, first_seen: np.ndarray | None = None
) -> dict[str, ItemPool]:
    """One pool per category; items without a category are in none."""
    numbers: dict[str, int] = {}
    codes = np.fromiter((numbers.setdefault(name, len(numbers)) for name in categories), np.int64, len(categories))
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(numbers) + 1))
    pools = {}
    for name, i in numbers.items():
        rows = order[starts[i] : starts[i + 1]]
        if name:
            pools[name] = ItemPool(rows, weights[rows], None if first_seen is None else first_seen[rows])
    return pools


def pools_of(
    weights: np.ndarray, first_seen: np.ndarray | None = None, categories: Sequence[str] | None = None
) -> PoolOf:
    """From a target's row to the pool of its negatives: all items, or those of the target's category.

    Args:
        weights: [items], see ``ItemPool``.
        first_seen: int64 [items], see ``ItemPool``.
        categories: of each item; None: one pool for all targets.
    """
    if categories is None:
        pool = ItemPool(np.arange(len(weights)), weights, first_seen)
        return lambda target: pool
    pools = category_pools(categories, weights, first_seen)
    return lambda target: pools.get(categories[target])


def draw_negatives(
    pool_of: PoolOf,
    targets: Sequence[int],
    excluded: AbstractSet[int],
    count: int,
    stream: random.Random,
    before: int = 0,
) -> list[int]:
    """Up to ``count`` negatives, dealt evenly over the targets, each from its target's pool."""
    taken = set(excluded) | set(targets)
    negatives: list[int] = []
    for i, target in enumerate(targets):
        pool = pool_of(target)
        wanted = (count - len(negatives)) // (len(targets) - i)
        drawn = pool.draw(wanted, taken, stream, before) if pool else []
        negatives += drawn
        taken.update(drawn)
    return negatives


def draw_shown(
    shown: Sequence[int], targets: Sequence[int], excluded: AbstractSet[int], count: int, stream: random.Random
) -> list[int]:
    """Up to ``count`` negatives among the items shown with the targets."""
    eligible = [row for row in dict.fromkeys(shown) if row not in excluded and row not in set(targets)]
    return stream.sample(eligible, min(count, len(eligible)))
