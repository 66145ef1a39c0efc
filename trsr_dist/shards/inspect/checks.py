"""What may be wrong within one sample. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trsr_dist.records import Candidate, Sample
from trsr_dist.shards.inspect.similar import normal
from trsr_dist.words import has_text, split_words

TARGET_IN_HISTORY = "the target stands in the history"
TARGET_IN_SOURCES = "the target is among the items that the summary was made from"
TARGET_IN_RECENT = "the target's text is among the recent items"
TARGET_IN_SUMMARY = "the target's text stands in the summary"
NEGATIVE_IN_HISTORY = "a negative stands in the history"
ITEM_TWICE = "a candidate is listed twice"
EQUAL_TEXTS = "a positive and a negative have the same text"
NO_TEXT = "a candidate has no text"
NO_POSITIVE = "there is no positive"
NO_NEGATIVE = "there is no negative"
NO_HISTORY = "the provenance holds no history"

TARGET_LEAKS = (TARGET_IN_HISTORY, TARGET_IN_SOURCES, TARGET_IN_RECENT, TARGET_IN_SUMMARY)
"""Expected where data.repeated_target=keep."""
ERRORS = (TARGET_IN_HISTORY, TARGET_IN_SOURCES, NEGATIVE_IN_HISTORY, ITEM_TWICE)
"""The others are warnings: two items may have the same text."""
LEAST_WORDS = 4
"""A shorter text may stand in a summary by chance."""


def sample_faults(sample: Sample) -> Iterator[str]:
    """The faults of a sample, each once, in the words above."""
    positives = [candidate for candidate in sample.candidates if candidate.label]
    negatives = [candidate for candidate in sample.candidates if not candidate.label]
    if not positives:
        yield NO_POSITIVE
    if not negatives:
        yield NO_NEGATIVE
    yield from _candidate_faults(sample.candidates, positives, negatives)
    yield from _history_faults(sample, positives, negatives)
    yield from _text_faults(sample, positives)


def _candidate_faults(
    candidates: Sequence[Candidate], positives: list[Candidate], negatives: list[Candidate]
) -> Iterator[str]:
    if len({candidate.item for candidate in candidates}) < len(candidates):
        yield ITEM_TWICE
    if not all(has_text(candidate.text) for candidate in candidates):
        yield NO_TEXT
    if {normal(c.text) for c in positives} & {normal(c.text) for c in negatives}:
        yield EQUAL_TEXTS


def _history_faults(sample: Sample, positives: list[Candidate], negatives: list[Candidate]) -> Iterator[str]:
    history = sample.provenance.get("history")
    if not isinstance(history, list) or not history or not all(isinstance(item, str) for item in history):
        yield NO_HISTORY
        return
    targets = {candidate.item for candidate in positives}
    if targets & set(history):
        yield TARGET_IN_HISTORY
    if any(targets & set(history[start:stop]) for start, stop in _spans(sample)):
        yield TARGET_IN_SOURCES
    if {candidate.item for candidate in negatives} & set(history):
        yield NEGATIVE_IN_HISTORY


def _spans(sample: Sample) -> Iterator[tuple[int, int]]:
    """Which items of the history each summary was made from; nothing where other programs wrote the provenance."""
    nodes = sample.provenance.get("nodes")
    for node in nodes if isinstance(nodes, list) else ():
        match node:
            case [_, int(start), int(stop), *_]:
                yield start, stop


def _text_faults(sample: Sample, positives: list[Candidate]) -> Iterator[str]:
    texts = [normal(candidate.text) for candidate in positives]
    if set(texts) & {normal(text) for text in sample.recent}:
        yield TARGET_IN_RECENT
    summary = normal(sample.summary)
    if any(text in summary for text in texts if len(split_words(text)) >= LEAST_WORDS):
        yield TARGET_IN_SUMMARY
