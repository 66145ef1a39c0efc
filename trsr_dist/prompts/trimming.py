"""Fit a prompt into a token limit by its parts: what matters least goes first, and every cut is counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from trsr_dist.errors import DataError

UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Scripts without blanks between words: Thai, Lao, Burmese, Khmer, kana and Han."""
WORD = re.compile(rf"\s*(?:[{UNSPACED}]{{1,2}}|[^\s{UNSPACED}]{{1,16}})")
"""A word with the blanks before it; in scripts without them, two characters. Longer runs are cut within."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a user's prompts that may be cut, and what was cut."""

    summary: str
    recent: tuple[str, ...]
    candidates: tuple[str, ...]
    recent_dropped: int = 0
    summary_words_cut: int = 0
    item_words_cut: int = 0

    @property
    def trims(self) -> dict[str, int]:
        """Counts of what was cut; empty where nothing was."""
        counts = {
            "recent_dropped": self.recent_dropped,
            "summary_words_cut": self.summary_words_cut,
            "item_words_cut": self.item_words_cut,
        }
        return {name: count for name, count in counts.items() if count}


def trim(parts: Parts, fits: Callable[[Parts], bool], user: str) -> Parts:
    """Cut until ``fits``: oldest recent items down to one, the summary's tail, then item texts evenly.

    Args:
        parts: untrimmed parts.
        fits: whether the longest of the user's prompts is within the limit.
        user: for the error message.

    Raises:
        DataError: instruction and answer cue alone are over the limit.
    """
    while not fits(parts) and len(parts.recent) > 1:
        parts = replace(parts, recent=parts.recent[1:], recent_dropped=parts.recent_dropped + 1)
    if not fits(parts):
        parts = _cut_summary(parts, fits)
    if not fits(parts):
        parts = _cut_items(parts, fits)
    if not fits(parts):
        raise DataError(
            f"user {user!r}: instruction and answer cue alone exceed prompt.max_tokens; raise prompt.max_tokens"
        )
    return parts


def cut_words(text: str, num_words: int) -> str:
    """The first ``num_words`` words."""
    return "".join(WORD.findall(text)[:num_words]).strip()


def count_words(text: str) -> int:
    """Words as ``cut_words`` counts them."""
    return len(WORD.findall(text))


def cap_text(text: str, max_tokens: int, count: Callable[[str], int]) -> str:
    """The longest word-wise head of ``text`` within ``max_tokens``; a single longer word is cut by characters."""
    if count(text) <= max_tokens:
        return text
    kept = _largest(count_words(text), lambda n: count(cut_words(text, n)) <= max_tokens)
    if kept:
        return cut_words(text, kept)
    return text[: _largest(len(text), lambda n: count(text[:n]) <= max_tokens)]


def _cut_summary(parts: Parts, fits: Callable[[Parts], bool]) -> Parts:
    num_words = count_words(parts.summary)

    def cut(kept: int) -> Parts:
        return replace(parts, summary=cut_words(parts.summary, kept), summary_words_cut=num_words - kept)

    return cut(_largest(num_words, lambda kept: fits(cut(kept))))


def _cut_items(parts: Parts, fits: Callable[[Parts], bool]) -> Parts:
    """Cap all item texts at the same number of words, so that long descriptions pay first."""
    longest = max(map(count_words, (*parts.recent, *parts.candidates)))

    def cut(kept: int) -> Parts:
        recent, candidates = _capped(parts.recent, kept), _capped(parts.candidates, kept)
        before, after = (_num_words((*p, *q)) for p, q in ((parts.recent, parts.candidates), (recent, candidates)))
        return replace(parts, recent=recent, candidates=candidates, item_words_cut=before - after)

    return cut(_largest(longest, lambda kept: fits(cut(kept))))


def _capped(texts: Sequence[str], num_words: int) -> tuple[str, ...]:
    return tuple(cut_words(text, num_words) for text in texts)


def _num_words(texts: Sequence[str]) -> int:
    return sum(map(count_words, texts))


def _largest(high: int, good: Callable[[int], bool]) -> int:
    """The largest n in 0..high with ``good(n)``, for a predicate that turns false once; 0 where none is good."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low
