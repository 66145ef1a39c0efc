"""Which candidates a user gets in an epoch, which users share a row, which rank gets which row. Pure: numpy only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from trsr_dist.shards.order import mix

PAIRS_PER_TOKEN = 24576
"""Query-key pairs that cost as much as one token's matrix products: 6 * hidden size, at a hidden size of 4096. A layer
of a decoder spends about 24 * hidden^2 FLOPs on a token and 4 * hidden on a pair."""

GOOD_FILL = 0.99
"""Rows this full are not packed a second time."""
SAMPLED_UNITS = 32
"""Lengths, from longest to shortest, among which a row looks for what fills it."""


def choose_candidates(
    keys: np.ndarray,
    starts: np.ndarray,
    labels: np.ndarray,
    negatives: int,
    seed: int,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """All positives of each user and a random draw of its negatives, without replacement.

    Args:
        keys: uint64, shape (num_users,): a hash of each user.
        starts: int64, shape (num_users + 1,): where each user's candidates begin.
        labels: bool, shape (num_candidates,).
        negatives: per positive; a user without positives counts as one with one.
        seed: of this epoch's draw.
        allowed: bool, shape (num_candidates,): negatives are drawn among these alone; None: among all.

    Returns:
        bool, shape (num_candidates,): whether a candidate is in.
    """
    counts = np.diff(starts)
    owner = np.repeat(np.arange(len(keys)), counts)
    number = np.arange(len(labels)) - starts[owner]
    rank = mix(mix(keys ^ np.uint64(seed))[owner] + number.astype(np.uint64)) >> np.uint64(24)
    if allowed is not None:
        rank[~allowed] = (1 << 40) - 1
    rank[labels] = 0
    # One sort by (user, rank): the user's number stands above the 40 bits of the rank.
    by_rank = np.argsort((owner.astype(np.uint64) << np.uint64(40)) | rank, kind="stable")
    positives = np.bincount(owner[labels], minlength=len(keys))
    wanted = positives + negatives * np.maximum(positives, 1)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[by_rank] = number < wanted[owner]
    return chosen if allowed is None else chosen & (allowed | labels)


def pack(tokens: np.ndarray, capacity: int, ties: np.ndarray) -> list[list[int]]:
    """Fill rows with units: by best fit, and where that leaves too much room, row by row with the sums that fit best.

    Best fit puts like beside like; units of nearly the same length then leave the same room in every row.

    Args:
        tokens: int64, shape (num_units,): none above ``capacity``.
        capacity: tokens of a row.
        ties: uint64, shape (num_units,): the order of units of equal length.

    Returns:
        Unit numbers of each row.
    """
    order = np.lexsort((ties, -tokens))
    units, sizes = order.tolist(), tokens[order].tolist()
    rows = _best_fit(sizes, capacity)
    if len(rows) * capacity * GOOD_FILL > sum(sizes):
        rows = min(rows, _best_sums(sizes, capacity), key=len)
    return [[units[place] for place in row] for row in rows]


def _best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Each unit, longest first, into the fullest row that still takes it."""
    rows: list[list[int]] = []
    spaces: list[int] = []
    """Distinct free spaces of the rows begun, ascending."""
    by_space: dict[int, list[list[int]]] = {}
    for unit, size in enumerate(sizes):
        place = bisect_left(spaces, size)
        if place == len(spaces):
            row, space = [], capacity
            rows.append(row)
        else:
            space = spaces[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        row.append(unit)
        space -= size
        if space not in by_space:
            by_space[space] = []
            insort(spaces, space)
        by_space[space].append(row)
    return rows


def _best_sums(sizes: list[int], capacity: int) -> list[list[int]]:
    """Each row takes the longest unit left and those of a sample of the others that fill it best.

    After minimum bin slack (Gupta and Ho 1999), with sums of a sample of lengths instead of a search.
    """
    left = list(range(len(sizes)))
    rows = []
    while left:
        row = [left.pop(0)]
        places = range(0, len(left), max(1, len(left) // SAMPLED_UNITS))
        chosen = _best_sum([sizes[left[place]] for place in places], capacity - sizes[row[0]])
        row += [left.pop(places[number]) for number in chosen]
        rows.append(row)
    return rows


def _best_sum(sizes: list[int], space: int) -> list[int]:
    """Places, descending, of sizes with the largest sum within ``space``; early ones are preferred."""
    within = (1 << (space + 1)) - 1
    sums = [1]
    """Bit s of entry k: some of the first k sizes add up to s."""
    for size in sizes:
        sums.append((sums[-1] | sums[-1] << size) & within)
    rest, chosen = sums[-1].bit_length() - 1, []
    for place in reversed(range(len(sizes))):
        if not sums[place] >> rest & 1:
            chosen.append(place)
            rest -= sizes[place]
    return chosen


def split_unit(prefix: int, suffixes: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """(first, last + 1) of the candidates of each chunk of a user that does not fit a row; the prefix is repeated."""
    chunks, first, used = [], 0, prefix
    for number, suffix in enumerate(suffixes):
        if used + suffix > capacity and number > first:
            chunks.append((first, number))
            first, used = number, prefix
        used += suffix
    return [*chunks, (first, len(suffixes))]


def attended_pairs(prefix: np.ndarray, suffix_sum: np.ndarray, suffix_squares: np.ndarray) -> np.ndarray:
    """Query-key pairs of units: causal over the prefix, each suffix over the prefix and itself."""
    return prefix * (prefix + 1) // 2 + prefix * suffix_sum + (suffix_squares + suffix_sum) // 2


def row_cost(tokens: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cost in tokens: the products of each token and the attention."""
    return tokens + pairs / PAIRS_PER_TOKEN


def deal(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Rows of a step for each rank: equally many places, the k-th of all ranks of similar cost, the sums balanced.

    Places without a row (fewer rows than places) are left out at the end of a rank's list; the caller fills them with
    empty rows up to ``ceil(rows / world_size)``.
    """
    order = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0.0] * world_size
    for first in range(0, len(order), world_size):
        ranks = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, row in zip(ranks, order[first : first + world_size], strict=False):
            hands[rank].append(row)
            loads[rank] += costs[row]
    return hands
