"""Fit a summarization prompt into a token limit by its parts. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from trsr_dist.errors import DataError
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.prompts.trimming import cut_words


def trim_prompt(prompt: SummaryPrompt, count: Callable[[SummaryPrompt], int], limit: int) -> tuple[SummaryPrompt, int]:
    """Cut item texts evenly, the longest first, then earlier summaries; never the instruction.

    Args:
        prompt: the whole prompt.
        count: true number of tokens of a prompt.
        limit: tokens allowed.

    Returns:
        The prompt that fits and the number of words cut.

    Raises:
        DataError: the instruction alone is over the limit.
    """
    fitted = prompt
    for name in ("items", "previous"):
        if count(fitted) > limit:
            fitted = _cap_words(fitted, name, count, limit)
    if count(fitted) > limit:
        raise DataError(
            f"a summarization prompt has {count(fitted)} tokens without any item and {limit} are allowed; raise "
            "summarize.max_prompt_tokens or use a model with a longer context"
        )
    return fitted, _num_words(prompt) - _num_words(fitted)


def _cap_words(prompt: SummaryPrompt, name: str, count: Callable[[SummaryPrompt], int], limit: int) -> SummaryPrompt:
    """The largest cap on the words of each text of a part with which the prompt fits; 0 where none does."""
    texts = getattr(prompt, name)
    longest = max((len(text.split()) for text in texts), default=0)

    def capped(num_words: int) -> SummaryPrompt:
        return replace(prompt, **{name: tuple(cut_words(text, num_words) for text in texts)})

    too_many = bisect_left(range(longest + 1), True, key=lambda n: count(capped(n)) > limit)
    return capped(max(too_many - 1, 0))


def _num_words(prompt: SummaryPrompt) -> int:
    return sum(len(text.split()) for text in (*prompt.previous, *prompt.items))
