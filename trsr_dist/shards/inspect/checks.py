"""What may be wrong within one sample, and which texts are equal but for a word or two. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache

from trsr_dist.records import Candidate, Sample
from trsr_dist.words import comparable, has_text, search_terms, split_words

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
LEAST_SIMILARITY = 0.9
"""Jaccard similarity of two texts' sets of terms from which they count as near-duplicates."""

Words = frozenset[str]


def sample_faults(sample: Sample) -> Iterator[str]:
    """The faults of a sample, each once, in the words above."""
    positives = [candidate for candidate in sample.candidates if candidate.label]
    negatives = [candidate for candidate in sample.candidates if not candidate.label]
    if not positives:
        yield NO_POSITIVE
    if not negatives:
        yield NO_NEGATIVE
    if len({candidate.item for candidate in sample.candidates}) < len(sample.candidates):
        yield ITEM_TWICE
    if not all(has_text(candidate.text) for candidate in sample.candidates):
        yield NO_TEXT
    texts = [normal(candidate.text) for candidate in positives]
    if not {normal(candidate.text) for candidate in negatives}.isdisjoint(texts):
        yield EQUAL_TEXTS
    yield from _history_faults(sample, positives, negatives)
    if set(texts) & {normal(text) for text in sample.recent}:
        yield TARGET_IN_RECENT
    summary = normal(sample.summary)
    if any(text in summary for text in texts if len(split_words(text)) >= LEAST_WORDS):
        yield TARGET_IN_SUMMARY


def _history_faults(sample: Sample, positives: list[Candidate], negatives: list[Candidate]) -> Iterator[str]:
    history = sample.provenance.get("history")
    if not isinstance(history, list) or not history or not all(isinstance(item, str) for item in history):
        yield NO_HISTORY
        return
    targets = {candidate.item for candidate in positives}
    if targets & set(history):
        yield TARGET_IN_HISTORY
    nodes = sample.provenance.get("nodes")
    sources: set[str] = set()
    for node in nodes if isinstance(nodes, list) else ():
        match node:  # anything else is of another program
            case [_, int(start), int(stop), *_]:
                sources.update(history[start:stop])
    if targets & sources:
        yield TARGET_IN_SOURCES
    if {candidate.item for candidate in negatives} & set(history):
        yield NEGATIVE_IN_HISTORY


@lru_cache(maxsize=1 << 16)
def normal(text: str) -> str:
    """The words alone, in one case."""
    return comparable(text)


def near_duplicates(probes: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """For each probe that has one, an item of ``others`` with another id and nearly the same words.

    Exact: of two similar sets, the few rarest words of each have one in common (prefix filter; Bayardo, Ma and
    Srikant 2007).

    Args:
        probes: text by item id.
        others: text by item id.
    """
    ids_by_words: dict[Words, list[str]] = defaultdict(list)
    for item, text in others.items():
        ids_by_words[_words(text)].append(item)
    counts = Counter(word for words in ids_by_words for word in words)
    by_rare_word: dict[str, list[Words]] = defaultdict(list)
    for words in ids_by_words:
        for word in _rarest(words, counts):
            by_rare_word[word].append(words)
    found = {}
    for item, text in probes.items():
        words = _words(text)
        near = {other for word in _rarest(words, counts) for other in by_rare_word.get(word, ())}
        matches = (
            match for other in near if _similarity(words, other) >= LEAST_SIMILARITY for match in ids_by_words[other]
        )
        twin = min((match for match in matches if match != item), default=None)
        if twin is not None:
            found[item] = twin
    return found


def _words(text: str) -> Words:
    return frozenset(search_terms(text))


def _rarest(words: Words, counts: Counter[str]) -> list[str]:
    """The rarest words, as many as it takes for a similar set to share one of them."""
    kept = len(words) - math.ceil(LEAST_SIMILARITY * len(words)) + 1
    return sorted(words, key=lambda word: (counts[word], word))[:kept]


def _similarity(first: Collection[str], second: Collection[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
