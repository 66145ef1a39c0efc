"""What two splits have in common and should not."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from trsr_dist.shards.inspect.content import SplitContent
from trsr_dist.shards.inspect.findings import Findings
from trsr_dist.shards.inspect.similar import near_duplicates
from trsr_dist.shards.reader import ShardSet

TRAIN = "train"


def judge_overlaps(contents: Mapping[str, SplitContent], shards: Mapping[str, ShardSet], findings: Findings) -> None:
    """Compare every two splits: users, equal contents; and targets held out with the items of training."""
    for one, other in combinations(contents, 2):
        _judge_users(contents[one], contents[other], shards[other], findings)
    held_out = [content for name, content in contents.items() if name != TRAIN and TRAIN in contents]
    for content in held_out:
        _judge_texts(contents[TRAIN], content, findings)


def _judge_users(one: SplitContent, other: SplitContent, shards: ShardSet, findings: Findings) -> None:
    both = _shared(one.users, other.users)
    if len(both):
        user = shards.read(other.indices[both[0]]).user
        findings.error(f"{one.name} and {other.name}: {len(both)} users stand in both (such as {user!r})")
    equal = np.setdiff1d(_shared(one.contents, other.contents), both)
    if len(equal):
        user = shards.read(other.indices[equal[0]]).user
        findings.warning(
            f"{one.name} and {other.name}: {len(equal)} users of {other.name} whose summary, recent items and targets "
            f"equal those of a user of {one.name} (such as {user!r})"
        )


def _judge_texts(train: SplitContent, held_out: SplitContent, findings: Findings) -> None:
    targets = {item: held_out.texts[item] for item in held_out.target_counts}
    twins = near_duplicates(targets, train.texts)
    if twins:
        item, twin = next(iter(twins.items()))
        users = sum(held_out.target_counts[target] for target in twins)
        findings.warning(
            f"{train.name} and {held_out.name}: {len(twins)} targets of {users} users of {held_out.name} have nearly "
            f"the text of another item of {train.name} (such as {item!r} and {twin!r})"
        )


def _shared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64: places in ``second`` of values that ``first`` has too."""
    return np.flatnonzero(np.isin(np.array(second, np.uint64), np.array(first, np.uint64)))
