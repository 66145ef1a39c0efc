"""Fit a summarization prompt into a token limit by its parts. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from trsr_dist.errors import DataError
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.prompts.trimming import CHARACTERS_PER_TOKEN, head_of
from trsr_dist.words import count_words, cut_words


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
            fitted = _cap(fitted, name, count, limit)
    if count(fitted) > limit:
        raise DataError(
            f"a summarization prompt has {count(fitted)} tokens without any item and {limit} are allowed; raise "
            "summarize.max_prompt_tokens or use a model with a longer context"
        )
    return fitted, _num_words_cut((*prompt.previous, *prompt.items), (*fitted.previous, *fitted.items))


def _cap(prompt: SummaryPrompt, name: str, count: Callable[[SummaryPrompt], int], limit: int) -> SummaryPrompt:
    """The largest cap on the length of each text of a part with which the prompt fits; 0 where none does."""
    texts = getattr(prompt, name)

    def largest(longest: int, cut: Callable[[str, int], str]) -> SummaryPrompt:
        def capped(length: int) -> SummaryPrompt:
            return replace(prompt, **{name: tuple(cut(text, length) for text in texts)})

        too_many = bisect_left(range(longest + 1), True, key=lambda length: count(capped(length)) > limit)
        return capped(max(too_many - 1, 0))

    by_words = largest(max(map(count_words, texts), default=0), cut_words)
    if any(getattr(by_words, name)):
        return by_words
    return largest(max(map(len, texts), default=0), lambda text, length: text[:length])


def _num_words_cut(before: Sequence[str], after: Sequence[str]) -> int:
    """A word that lost characters counts as well."""
    pairs = zip(before, after, strict=True)
    return sum(max(count_words(old) - count_words(new), int(old != new)) for old, new in pairs)
