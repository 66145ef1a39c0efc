"""From prompts to token ids with a Hugging Face tokenizer, for engines that hold the model in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from trsr_dist.errors import ModelError
from trsr_dist.prompts.encoder import Encoder
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.prompts.trimming import trim_prompt
from trsr_dist.summarize.quality import THOUGHTS
from trsr_dist.summarize.requests import EngineSettings


class PromptEncoder:
    """Writes, counts and trims the prompts of one model.

    Args:
        tokenizer: the model's.
        style: ``plain``, ``chat`` or ``auto``.
        max_prompt_tokens: longer prompts are trimmed.
        template_kwargs: variables of the chat template.
    """

    def __init__(
        self, tokenizer: Any, style: str, max_prompt_tokens: int, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self._encoder = Encoder(tokenizer, style, template_kwargs, "summarize.prompt_style")
        self.style = self._encoder.style
        self.opening = THOUGHTS[0] if self._encoder.tail.rstrip().endswith(THOUGHTS[0]) else ""
        """What belongs before every text: the template itself begins the model's thoughts."""

    @classmethod
    def of(cls, tokenizer: Any, settings: EngineSettings) -> PromptEncoder:
        """Of the prompts that the settings ask for."""
        return cls(tokenizer, settings.prompt_style, settings.max_prompt_tokens, settings.chat_template_kwargs)

    def encode(self, prompt: SummaryPrompt) -> list[int]:
        """Token ids."""
        return self._encoder.encode([prompt.prompt(self._encoder.value)])[0]

    def fit(self, prompt: SummaryPrompt) -> tuple[list[int], int]:
        """Token ids of the prompt, trimmed by true token count, and the number of words cut.

        Raises:
            DataError: the instruction alone is over the limit.
        """
        encode = cache(self.encode)
        fitted, words_cut = trim_prompt(prompt, lambda tried: len(encode(tried)), self.max_prompt_tokens)
        return encode(fitted), words_cut


@contextmanager
def naming_setting(name_or_path: str) -> Iterator[None]:
    """Errors of loading name the setting that the model comes from.

    Raises:
        ModelError: the summarizer's model cannot be used.
    """
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"summarize.model={name_or_path!r}: cannot be loaded: {error}; name a complete model folder or a hub id, "
            "with its summarize.revision"
        ) from None
