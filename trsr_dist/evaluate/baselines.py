"""Rankers without a language model, from what train users did. Pure: numpy only.

Each is a function from users' rows of the history store to one score per candidate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from trsr_dist.words import search_terms

Scorer = Callable[[Sequence[int], Sequence[int]], np.ndarray]
"""From item rows of the history and of the candidates to float64 scores, shape (num_candidates,)."""
Ranker = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[np.ndarray]]
"""The same for many users: histories, candidates, scores."""


def one_by_one(score: Scorer) -> Ranker:
    """A ranker that looks at one user after the other."""
    return lambda histories, candidates: list(map(score, histories, candidates))


def by_count(counts: np.ndarray) -> Scorer:
    """Rank by a count per item: of train users' clicks (popularity), or of the clicks that were their latest
    (recency, since a target is a user's latest click; needs no times)."""
    return lambda history, candidates: counts[list(candidates)].astype(np.float64)


class Bm25:
    """Okapi BM25 of the whole history as query against a candidate's text (Robertson and Zaragoza, 2009).

    Args:
        texts: of all items, by row; they give the document frequencies and the mean length. Their terms are words
            (n-grams of characters where words stand without blanks or carry particles).
        k1: saturation of a word's count.
        b: strength of the length normalization.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        self._terms = [Counter(search_terms(text)) for text in texts]
        lengths = np.array([sum(count.values()) for count in self._terms], dtype=np.float64)
        self._norms = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))
        self._scale = k1 + 1
        frequencies = Counter(word for count in self._terms for word in count)
        total = len(self._terms)
        self._idf = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in frequencies.items()}

    def __call__(self, history: Sequence[int], candidates: Sequence[int]) -> np.ndarray:
        query: Counter[str] = Counter()
        for item in history:
            query.update(self._terms[item])
        return np.array([self._score(query, item) for item in candidates])

    def _score(self, query: Counter[str], item: int) -> float:
        norm = self._norms[item]
        return sum(
            query[word] * self._idf[word] * count * self._scale / (count + norm)
            for word, count in self._terms[item].items()
            if word in query
        )
