"""Train, valid and test users. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trsr_dist.hashing import hash64

SPLITS = ("train", "valid", "test")


def split_by_user(user: str, shares: Sequence[int]) -> int:
    """Index into ``SPLITS`` from a hash of the key: who else is there does not matter.

    The hash is salted, so that it is independent of the one that orders the users.
    """
    point = hash64("split", user) % sum(shares)
    return 0 if point < shares[0] else 1 if point < shares[0] + shares[1] else 2


def split_by_time(times: np.ndarray, hashes: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """int8 [users], indices into ``SPLITS``: the latest targets are test, those before valid; equal times by hash."""
    order = np.lexsort((hashes, times))
    ends = np.cumsum(shares) * len(times) // sum(shares)
    splits = np.empty(len(times), np.int8)
    splits[order] = np.searchsorted(ends, np.arange(len(times)), side="right")
    return splits
