"""Texts that are equal but for a word or two. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from functools import lru_cache

from trsr_dist.words import comparable, search_terms

LEAST_SIMILARITY = 0.9
"""Jaccard similarity of two texts' sets of terms from which they count as near-duplicates."""

Words = frozenset[str]


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
