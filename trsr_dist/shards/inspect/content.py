"""One pass over all samples of each split: what they hold, what is wrong with them, and what two splits share."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.json_text import parse_json
from trsr_dist.log import progress
from trsr_dist.records import Candidate, Sample
from trsr_dist.shards.inspect.checks import ERRORS, TARGET_LEAKS, near_duplicates, sample_faults
from trsr_dist.shards.reader import ShardSet

TRAIN = "train"
SEPARATES = 0.1
"""A mean AUC this far from one half, and beyond two standard errors, is a warning."""
NEVER = np.iinfo(np.int64).max
"""Stands for the time of an item that nobody is known to have met: newer than all."""


class Lesson(TypedDict):
    """A line of what a summarizer learns from."""

    __pydantic_config__ = {"extra": "allow"}
    user: str


@dataclass(slots=True)
class Findings:
    """Errors (damage, leaks, users in two splits) and warnings."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line for each, errors first."""
        lines = [*(f"error: {text}" for text in self.errors), *(f"warning: {text}" for text in self.warnings)]
        return lines or ["nothing wrong was found"]


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """What the run's histories say of the items."""

    numbers: Mapping[str, tuple[int, int]]
    """By item id: clicks of train users, and Unix seconds at which the item was first met (0: unknown)."""
    drawn_by_clicks: bool
    """Negatives are drawn in proportion to clicks (data.candidates: popularity, targets)."""


@dataclass(slots=True)
class Shortcut:
    """AUC of one number, user by user."""

    name: str
    aucs: array = field(default_factory=lambda: array("d"))

    def add(self, positives: Sequence[int], negatives: Sequence[int]) -> None:
        """One user's numbers; a user without either kind counts for nothing."""
        if positives and negatives:
            self.aucs.append(user_auc(positives, negatives))

    @property
    def auc(self) -> float:
        """Mean over the users."""
        return float(np.mean(self.aucs))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(np.std(self.aucs) / np.sqrt(len(self.aucs)))

    @property
    def separates(self) -> bool:
        return abs(self.auc - 0.5) > max(SEPARATES, 2 * self.error)


def user_auc(positives: Sequence[int], negatives: Sequence[int]) -> float:
    """Share of the pairs in which the positive has the larger number; equal ones count half."""
    difference = np.sign(np.subtract.outer(np.asarray(positives, np.int64), np.asarray(negatives, np.int64)))
    return float((difference.mean() + 1) / 2)


class Shortcuts:
    """Whether popularity or age alone tells positives from negatives: a model may learn that instead of the user.

    A train target's popularity holds the target's own click, which is taken off; but not where negatives are drawn from
    the same clicks, since each of them was drawn by its own click.

    Args:
        facts: of the items.
        is_train: the split is the one whose clicks are counted.
    """

    def __init__(self, facts: ItemFacts, is_train: bool) -> None:
        self._numbers = facts.numbers
        self._own_click = int(is_train and not facts.drawn_by_clicks)
        self._has_times = any(first_seen for _, first_seen in facts.numbers.values())
        self._popularity = Shortcut("popularity")
        self._newness = Shortcut("item age (newer is higher)")
        self.num_unknown = 0
        """Candidates that the histories lack."""

    @property
    def measured(self) -> list[Shortcut]:
        """Those of which anything is known."""
        return [shortcut for shortcut in (self._popularity, self._newness) if shortcut.aucs]

    def add(self, candidates: Sequence[Candidate]) -> None:
        """The candidates of one user."""
        known = [candidate for candidate in candidates if candidate.item in self._numbers]
        self.num_unknown += len(candidates) - len(known)
        positives = [self._numbers[candidate.item] for candidate in known if candidate.label]
        negatives = [self._numbers[candidate.item] for candidate in known if not candidate.label]
        self._popularity.add([clicks - self._own_click for clicks, _ in positives], [clicks for clicks, _ in negatives])
        if self._has_times:
            self._newness.add([seen or NEVER for _, seen in positives], [seen or NEVER for _, seen in negatives])


@dataclass(slots=True)
class SplitContent:
    """What the samples of a split hold."""

    name: str
    shortcuts: Shortcuts | None
    """None where nothing is known of the items."""
    indices: array = field(default_factory=lambda: array("q"))
    """Number of each readable sample; the next arrays follow it."""
    users: array = field(default_factory=lambda: array("Q"))
    """Hash of each user's id."""
    contents: array = field(default_factory=lambda: array("Q"))
    """Hash of what each user's prompts say and which answers are right."""
    positives: array = field(default_factory=lambda: array("i"))
    negatives: array = field(default_factory=lambda: array("i"))
    target_counts: Counter[str] = field(default_factory=Counter)
    """How often each item is a target."""
    texts: dict[str, str] = field(default_factory=dict)
    """Text of every candidate item."""
    faults: Counter[str] = field(default_factory=Counter)
    """Users with each fault."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first user with each fault."""
    damaged: list[str] = field(default_factory=list)

    def add(self, index: int, sample: Sample) -> None:
        """Take one sample in."""
        targets = [candidate.item for candidate in sample.candidates if candidate.label]
        self.indices.append(index)
        self.users.append(hash64(sample.user))
        self.contents.append(hash64(sample.summary, *sample.recent, *targets))
        self.positives.append(len(targets))
        self.negatives.append(len(sample.candidates) - len(targets))
        self.target_counts.update(targets)
        self.texts.update((candidate.item, candidate.text) for candidate in sample.candidates)
        if self.shortcuts is not None:
            self.shortcuts.add(sample.candidates)
        for fault in sample_faults(sample):
            self.faults[fault] += 1
            self.examples.setdefault(fault, sample.user)


def read_content(shards: ShardSet, name: str, items: ItemFacts | None) -> SplitContent:
    """Read every sample; damaged ones are noted and passed over."""
    content = SplitContent(name, None if items is None else Shortcuts(items, name == TRAIN))
    for index in progress(range(len(shards)), description=name, unit=" samples"):
        try:
            content.add(index, shards.read(index))
        except DataError as error:
            content.damaged.append(str(error))
    return content


def judge_content(content: SplitContent, shards: ShardSet, findings: Findings) -> None:
    """Report what is wrong within the split."""
    findings.errors += content.damaged
    kept = shards.manifest.get("settings", {}).get("repeated_target") == "keep"
    for fault, count in sorted(content.faults.items()):
        is_error = fault in ERRORS and not (kept and fault in TARGET_LEAKS)
        found = findings.errors if is_error else findings.warnings
        found.append(f"{content.name}: {count} users where {fault} (such as {content.examples[fault]!r})")
    repeated = repeats(content.users)
    if len(repeated):
        user = shards.read(content.indices[repeated[0]]).user
        findings.errors.append(
            f"{content.name}: {len(repeated)} samples of users who stand twice or more (such as {user!r})"
        )
    equal = np.setdiff1d(repeats(content.contents), repeated)
    if len(equal):
        user = shards.read(content.indices[equal[0]]).user
        findings.warnings.append(
            f"{content.name}: {len(equal)} users whose summary, recent items and targets equal another's "
            f"(such as {user!r})"
        )
    for shortcut in content.shortcuts.measured if content.shortcuts is not None else ():
        if shortcut.separates:
            findings.warnings.append(
                f"{content.name}: {shortcut.name} alone tells positives from negatives (AUC {shortcut.auc:.3f}): a "
                "model may learn that instead of the user; see data.candidates and data.seen_before_target"
            )


def repeats(hashes: array) -> np.ndarray:
    """int64: places of all values but the first of its kind."""
    values = np.array(hashes, dtype=np.uint64)
    _, first = np.unique(values, return_index=True)
    return np.setdiff1d(np.arange(len(values)), first)


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
        findings.errors.append(f"{one.name} and {other.name}: {len(both)} users stand in both (such as {user!r})")
    equal = np.setdiff1d(_shared(one.contents, other.contents), both)
    if len(equal):
        user = shards.read(other.indices[equal[0]]).user
        findings.warnings.append(
            f"{one.name} and {other.name}: {len(equal)} users of {other.name} whose summary, recent items and targets "
            f"equal those of a user of {one.name} (such as {user!r})"
        )


def judge_lessons(lessons: Path, contents: Mapping[str, SplitContent], findings: Findings) -> None:
    """Report users of valid or test from whose targets the summarizer has learned.

    Args:
        lessons: folder of tools/choose_summaries.py.
        contents: of the splits.
        findings: reported to.

    Raises:
        DataError: there is no data set, or a line names no user.
    """
    users = array("Q")
    try:
        with open(lessons / "sft" / "train.jsonl", "rb") as lines:
            users.extend(hash64(parse_json(line, Lesson)["user"]) for line in lines)
    except OSError as error:
        raise DataError(f"{lessons}: not a folder that tools/choose_summaries.py wrote ({error.strerror})") from None
    for name, content in contents.items():
        if name != TRAIN and len(both := _shared(users, content.users)):
            findings.errors.append(
                f"{name}: the summarizer has learned from the targets of {len(both)} of its users ({lessons}); split "
                "the users as in that run"
            )


def _judge_texts(train: SplitContent, held_out: SplitContent, findings: Findings) -> None:
    targets = {item: held_out.texts[item] for item in held_out.target_counts}
    twins = near_duplicates(targets, train.texts)
    if twins:
        item, twin = next(iter(twins.items()))
        users = sum(held_out.target_counts[target] for target in twins)
        findings.warnings.append(
            f"{train.name} and {held_out.name}: {len(twins)} targets of {users} users of {held_out.name} have nearly "
            f"the text of another item of {train.name} (such as {item!r} and {twin!r})"
        )


def _shared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int64: places in ``second`` of values that ``first`` has too."""
    return np.flatnonzero(np.isin(np.array(second, np.uint64), np.array(first, np.uint64)))
