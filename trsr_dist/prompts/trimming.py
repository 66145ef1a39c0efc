"""Fit a prompt into a token limit by its parts: what matters least goes first, and every cut is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from trsr_dist.errors import DataError
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.words import count_words, cut_words, word_heads

CHARACTERS_PER_TOKEN = 16
"""A text is cut to as many characters for each token that it may have, before its tokens are counted: a text of a
megabyte costs no more than a long one."""


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


@dataclass(frozen=True, slots=True)
class Cuts:
    """What is cut off a user's prompts, the same for all candidates."""

    recent_dropped: int = 0
    """Oldest recent items."""
    summary_words: int | None = None
    """Words that are kept of the summary; None: all."""
    item_words: int | None = None
    """Words that are kept of each item text; None: all."""

    def apply(self, whole: Parts) -> Parts:
        """The parts without what is cut, which is counted."""
        parts = replace(whole, recent=whole.recent[self.recent_dropped :], recent_dropped=self.recent_dropped)
        if self.summary_words is not None:
            num_cut = whole.summary_words_cut + count_words(whole.summary) - self.summary_words
            parts = replace(parts, summary=cut_words(whole.summary, self.summary_words), summary_words_cut=num_cut)
        if self.item_words is not None:
            recent, candidates = (
                tuple(cut_words(text, self.item_words) for text in texts) for texts in (parts.recent, parts.candidates)
            )
            before = sum(map(count_words, (*parts.recent, *parts.candidates)))
            num_cut = before - sum(map(count_words, (*recent, *candidates)))
            parts = replace(parts, recent=recent, candidates=candidates, item_words_cut=num_cut)
        return parts


def trim(parts: Parts, fits: Callable[[Parts], bool], longest: int, user: str) -> Cuts:
    """Cut until ``fits``: oldest recent items down to one, the summary's tail, then item texts evenly.

    Args:
        parts: untrimmed parts, with all candidates or those with the longest prompts.
        fits: whether the longest of the prompts is within the limit.
        longest: words of the user's longest candidate.
        user: for the error message.

    Raises:
        DataError: instruction and answer cue alone are over the limit.
    """
    cuts = Cuts()

    def is_fine(tried: Cuts) -> bool:
        return fits(tried.apply(parts))

    while not is_fine(cuts) and cuts.recent_dropped < len(parts.recent) - 1:
        cuts = replace(cuts, recent_dropped=cuts.recent_dropped + 1)
    if not is_fine(cuts):
        kept = _largest(count_words(parts.summary), lambda kept: is_fine(replace(cuts, summary_words=kept)))
        cuts = replace(cuts, summary_words=kept)
    if not is_fine(cuts):
        # All item texts are capped at the same number of words, so that long descriptions pay first.
        longest = max([longest, *map(count_words, parts.recent[cuts.recent_dropped :])])
        cuts = replace(cuts, item_words=_largest(longest, lambda kept: is_fine(replace(cuts, item_words=kept))))
    if not is_fine(cuts):
        raise DataError(
            f"user {user!r}: instruction and answer cue alone exceed prompt.max_tokens; raise prompt.max_tokens"
        )
    return cuts


def head_of(text: str, max_characters: int) -> str:
    """The longest word-wise head within ``max_characters``, for texts that are too long to count their tokens."""
    if len(text) <= max_characters:
        return text
    head = text[:max_characters]
    return cut_words(head, max(1, count_words(head) - 1))


def cap_text(text: str, max_tokens: int, count: Callable[[str], int]) -> str:
    """The longest word-wise head of ``text`` within ``max_tokens``; a single longer word is cut by characters."""
    if count(text) <= max_tokens:
        return text
    heads = word_heads(text)
    kept = _largest(len(heads) - 1, lambda n: count(heads[n]) <= max_tokens)
    if kept:
        return heads[kept]
    return text[: _largest(len(text), lambda n: count(text[:n]) <= max_tokens)].strip()


def trim_prompt(prompt: SummaryPrompt, count: Callable[[SummaryPrompt], int], limit: int) -> tuple[SummaryPrompt, int]:
    """Cut item texts evenly, the longest first, then earlier summaries; never the instruction.

    Texts are cut by words, and by characters where whole words do not fit (scripts without blanks); those of more than
    16 characters for each token allowed are cut to these before tokens are counted.

    Args:
        prompt: the whole prompt.
        count: true number of tokens of a prompt.
        limit: tokens allowed.

    Returns:
        The prompt that fits and the number of words cut.

    Raises:
        DataError: the instruction alone is over the limit.
    """
    count = cache(count)
    longest = CHARACTERS_PER_TOKEN * limit
    fitted = replace(
        prompt,
        previous=tuple(head_of(text, longest) for text in prompt.previous),
        items=tuple(head_of(text, longest) for text in prompt.items),
    )
    if fitted == prompt and count(prompt) <= limit:
        return prompt, 0
    for name in ("items", "previous"):
        if count(fitted) > limit:
            fitted = _cap_part(fitted, name, count, limit)
    if count(fitted) > limit:
        raise DataError(
            f"a summarization prompt has {count(fitted)} tokens without any item and {limit} are allowed; raise "
            "summarize.max_prompt_tokens or use a model with a longer context"
        )
    pairs = zip((*prompt.previous, *prompt.items), (*fitted.previous, *fitted.items), strict=True)
    # A word that lost characters counts as well.
    return fitted, sum(max(count_words(old) - count_words(new), int(old != new)) for old, new in pairs)


def _cap_part(prompt: SummaryPrompt, name: str, count: Callable[[SummaryPrompt], int], limit: int) -> SummaryPrompt:
    """The largest cap on the length of each text of a part with which the prompt fits; 0 where none does."""
    texts = getattr(prompt, name)

    def capped(cut: Callable[[str, int], str], length: int) -> SummaryPrompt:
        return replace(prompt, **{name: tuple(cut(text, length) for text in texts)})

    def largest(longest: int, cut: Callable[[str, int], str]) -> SummaryPrompt:
        return capped(cut, _largest(longest, lambda length: count(capped(cut, length)) <= limit))

    by_words = largest(max(map(count_words, texts), default=0), cut_words)
    if any(getattr(by_words, name)):
        return by_words
    return largest(max(map(len, texts), default=0), lambda text, length: text[:length])


def _largest(high: int, good: Callable[[int], bool]) -> int:
    """The largest n in 0..high with ``good(n)``, for a predicate that turns false once; 0 where none is good."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low
