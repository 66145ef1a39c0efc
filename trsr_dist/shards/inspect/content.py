"""One pass over all samples of a split: what it holds, and what is wrong with single samples."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.log import progress
from trsr_dist.records import Sample
from trsr_dist.shards.inspect.checks import ERRORS, TARGET_LEAKS, sample_faults
from trsr_dist.shards.inspect.findings import Findings
from trsr_dist.shards.inspect.shortcuts import ItemFacts, Shortcuts
from trsr_dist.shards.reader import ShardSet


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
    content = SplitContent(name, None if items is None else Shortcuts(items, name == "train"))
    for index in progress(range(len(shards)), description=name, unit=" samples"):
        try:
            content.add(index, shards.read(index))
        except DataError as error:
            content.damaged.append(str(error))
    return content


def judge_content(content: SplitContent, shards: ShardSet, findings: Findings) -> None:
    """Report what is wrong within the split."""
    for error in content.damaged:
        findings.error(error)
    kept = shards.manifest.get("settings", {}).get("repeated_target") == "keep"
    for fault, count in sorted(content.faults.items()):
        is_error = fault in ERRORS and not (kept and fault in TARGET_LEAKS)
        findings.add(is_error, f"{content.name}: {count} users where {fault} (such as {content.examples[fault]!r})")
    repeated = repeats(content.users)
    if len(repeated):
        user = shards.read(content.indices[repeated[0]]).user
        findings.error(f"{content.name}: {len(repeated)} samples of users who stand twice or more (such as {user!r})")
    equal = np.setdiff1d(repeats(content.contents), repeated)
    if len(equal):
        user = shards.read(content.indices[equal[0]]).user
        findings.warning(
            f"{content.name}: {len(equal)} users whose summary, recent items and targets equal another's "
            f"(such as {user!r})"
        )
    for shortcut in content.shortcuts.measured if content.shortcuts is not None else ():
        if shortcut.separates:
            findings.warning(
                f"{content.name}: {shortcut.name} alone tells positives from negatives (AUC {shortcut.auc:.3f}): a "
                "model may learn that instead of the user; see data.candidates and data.seen_before_target"
            )


def repeats(hashes: array) -> np.ndarray:
    """int64: places of all values but the first of its kind."""
    values = np.array(hashes, dtype=np.uint64)
    _, first = np.unique(values, return_index=True)
    return np.setdiff1d(np.arange(len(values)), first)
