"""Changed prompts: the control (another user's text) and ablations. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from trsr_dist.errors import DataError
from trsr_dist.hashing import random_stream
from trsr_dist.records import Sample

Change = Literal["none", "control", "no_summary", "no_recent"]


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
