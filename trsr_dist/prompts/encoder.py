"""From prompts to token ids: texts never make a control token, whatever they spell. Pure; tokenizers are arguments.

A control token is any added token of the tokenizer, special or not. A prompt is tokenized as one string, chat template
included, so that the ids of ordinary texts are those of the plain way. Its control tokens are then compared with those
of the same prompt with harmless texts. Where they differ, each text that spells one gets a blank before the spelling's
last character (``<|im_end| >``), and the prompt is tokenized again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any

from trsr_dist.errors import DataError, ModelError
from trsr_dist.prompts.text import Prompt, as_value, broken

FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Templates that print today's date would change the prompts, and all that is known by their hash, at midnight."""
PROBES = ("Do this.\n\n[Items]\n- a b\n\nSummary:", "Answer yes or no.\n\n[Candidate]\nx; y: 12\n\nAnswer:")
"""Messages that a chat template must hold unchanged, between the same words."""
HARMLESS = "x"
UNKNOWN_CHARACTERS = "\U00013000\U0001fae0\U000f0000"
"""In no vocabulary: a hieroglyph, a new emoji, a character for private use."""
MARK = re.compile(r"[<＜﹤][^<>＜＞﹤﹥\s]{1,64}[>＞﹥]|<</?[A-Z]+>>|\[/?[A-Z_]{2,32}\]")
"""A word in angle brackets, or one of capitals in square brackets: how chat templates spell their turns, as tokens or
as plain text."""
MAX_ROUNDS = 64
MAX_REMEMBERED = 4096


class Encoder:
    """Tokenizes prompts with one tokenizer and style.

    Args:
        tokenizer: a Hugging Face tokenizer.
        style: ``plain``, ``chat`` or ``auto`` (chat where the tokenizer has a template).
        template_kwargs: further variables of the chat template, such as ``enable_thinking``.
        setting: name of the style's setting, for messages.

    Raises:
        ModelError: there is no usable chat template where one is asked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        style: str = "auto",
        template_kwargs: Mapping[str, Any] | None = None,
        setting: str = "prompt.style",
    ) -> None:
        self.tokenizer = tokenizer
        self.name = getattr(tokenizer, "name_or_path", "")
        self.style = resolve_style(tokenizer, style, setting)
        self.head, self.tail = "", ""
        """What the chat template puts around every message."""
        if self.style == "chat":
            self.head, self.tail = template_ends(tokenizer, template_kwargs or {}, setting)
        ids = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
        found = tokenizer(UNKNOWN_CHARACTERS, add_special_tokens=False)["input_ids"]
        # All special and added tokens, without the unknown one where ordinary unknown characters become it.
        self._control = frozenset(ids - ({tokenizer.unk_token_id} & set(found)))
        template = getattr(tokenizer, "chat_template", None)
        self._marks = frozenset(MARK.findall(template if isinstance(template, str) else self.head + self.tail))
        closed = tokenizer(HARMLESS, add_special_tokens=True)["input_ids"]
        self._num_appended = sum(1 for _ in takewhile(self._control.__contains__, reversed(closed)))
        """Special tokens that the tokenizer puts behind a text."""
        self._harmless: dict[tuple[Any, ...], list[int]] = {}
        if self.style == "chat" and self.ids([self.head + HARMLESS + self.tail])[0][-1] == tokenizer.eos_token_id:
            raise ModelError(
                f"tokenizer {self.name!r}: its chat template ends with the end token, where the answer should begin; "
                f"set {setting}=plain"
            )

    def value(self, text: str) -> str:
        """``as_value``, with a blank in what the chat template writes as plain text too (``[/INST ]`` with Llama 2)."""
        text = as_value(text)
        if not self._marks:
            return text
        return MARK.sub(lambda mark: broken(mark[0]) if mark[0] in self._marks else mark[0], text)

    def text(self, prompt: Prompt) -> str:
        """The whole prompt as the model reads it."""
        return self._render(self.harmless(prompt))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole prompts, taken as they are; without the end token that some tokenizers append.

        Chat templates write their own special tokens.
        """
        return self._tokenize(texts, self.style == "plain")

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts.

        Raises:
            DataError: a text makes a control token and cannot be taken apart.
        """
        ids = self.ids([self._render(prompt) for prompt in prompts])
        for place, prompt in enumerate(prompts):
            if self.control_of(ids[place]) != self._control_tokens(prompt):
                ids[place] = self.ids([self.text(prompt)])[0]
        return ids

    def part_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of parts of prompts, without special tokens around them; fast, without the library's wrapper."""
        backend = self.tokenizer.backend_tokenizer if getattr(self.tokenizer, "is_fast", False) else None
        if backend is None or backend.truncation or backend.padding or backend.encode_special_tokens:
            return self._tokenize(texts, False)
        return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def count(self, text: str) -> int:
        """Tokens of a text alone, as a part of a prompt."""
        ids = self._tokenize([text], False)[0]
        if self._control.isdisjoint(ids):
            return len(ids)
        return len(self._tokenize([self.harmless(Prompt(("", ""), (text,))).texts[0]], False)[0])

    def harmless(self, prompt: Prompt) -> Prompt:
        """The prompt with a blank in each spelling of a control token in its texts.

        Raises:
            DataError: a text makes a control token and cannot be taken apart.
        """
        for number in range(MAX_ROUNDS):
            text = self._render(prompt)
            if self.control_of(self.ids([text])[0]) == self._control_tokens(prompt):
                return prompt
            # Where blanks do not help (a token of one character, a normalizer that takes them out), characters go.
            prompt = self._taken_apart(prompt, self._spellings(text), "" if number > 1 else None)
        raise DataError(
            f"tokenizer {self.name!r}: a text becomes one of its control tokens however it is taken apart: "
            f"{str(prompt)[-200:]!r}; remove that text, or the added token from the tokenizer"
        )

    def _render(self, prompt: Prompt) -> str:
        return f"{self.head}{prompt}{self.tail}"

    def _tokenize(self, texts: Sequence[str], with_special: bool) -> list[list[int]]:
        ids = self.tokenizer(list(texts), add_special_tokens=with_special)["input_ids"]
        return [one[: -self._num_appended] for one in ids] if with_special and self._num_appended else ids

    def control_of(self, ids: Sequence[int]) -> list[int]:
        """The control tokens among ids, in their order."""
        return list(filter(self._control.__contains__, ids))

    def _control_tokens(self, prompt: Prompt) -> list[int]:
        """Those of the same prompt with harmless texts."""
        key = (prompt.words, tuple(map(bool, prompt.texts)))
        if key not in self._harmless:
            if len(self._harmless) >= MAX_REMEMBERED:
                self._harmless.clear()
            twin = Prompt(prompt.words, tuple(HARMLESS if text else "" for text in prompt.texts))
            self._harmless[key] = self.control_of(self.ids([self._render(twin)])[0])
        return self._harmless[key]

    def _spellings(self, text: str) -> list[tuple[int, int]]:
        """Where control tokens stand in a rendered prompt."""
        if not getattr(self.tokenizer, "is_fast", False):
            names = [name for name in self.tokenizer.convert_ids_to_tokens(sorted(self._control)) if name]
            return sorted({found.span() for name in names for found in re.finditer(re.escape(name), text)})
        with_special = self.style == "plain"
        encoded = self.tokenizer(text, add_special_tokens=with_special, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [span for token, span in pairs if token in self._control]

    def _taken_apart(self, prompt: Prompt, spans: Sequence[tuple[int, int]], between: str | None) -> Prompt:
        """The prompt with a blank before the last character of each span's share of a text, or without that character.

        Args:
            prompt: which.
            spans: of the rendered prompt.
            between: stands for the last character; None: it stays, behind a blank.
        """
        lengths = [len(part) for pair in zip(prompt.words, prompt.texts, strict=False) for part in pair]
        starts = list(accumulate(lengths, initial=len(self.head)))[1::2]
        texts = list(prompt.texts)
        for begin, end in sorted(spans, reverse=True):
            for number, (start, text) in enumerate(zip(starts, prompt.texts, strict=True)):
                first, last = max(begin, start) - start, min(end, start + len(text)) - start
                if first < last:
                    now = texts[number]
                    middle = f" {now[last - 1]}" if between is None else between
                    texts[number] = now[: last - 1] + middle + now[last:]
        return Prompt(prompt.words, tuple(texts))


def resolve_style(tokenizer: Any, style: str, setting: str = "prompt.style") -> str:
    """``auto`` becomes ``chat`` where the tokenizer has a chat template.

    Raises:
        ModelError: chat was asked for and there is no template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if style == "chat" and not has_template:
        name = getattr(tokenizer, "name_or_path", "")
        raise ModelError(f"tokenizer {name!r} has no chat template; use {setting}=plain")
    return "chat" if style == "chat" or (style == "auto" and has_template) else "plain"


def template_ends(tokenizer: Any, template_kwargs: Mapping[str, Any], setting: str) -> tuple[str, str]:
    """What the chat template puts before and behind a user's message, up to where the answer begins; the same on any
    day.

    Raises:
        ModelError: the template cannot be rendered, or does not hold the message once and unchanged.
    """
    name, remedy = getattr(tokenizer, "name_or_path", ""), f"set {setting}=plain, or repair the tokenizer's template"
    ends = set()
    for message in PROBES:
        try:
            template = tokenizer.get_chat_template()
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": message}],
                tokenize=False,
                add_generation_prompt=True,
                chat_template=FIXED_DATE + template if "strftime_now" in template else None,
                **template_kwargs,
            )
        except Exception as error:  # a template is a program: it may raise anything, jinja's own errors among them
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            given = f" with the variables {dict(template_kwargs)}" if template_kwargs else ""
            raise ModelError(
                f"tokenizer {name!r}: its chat template cannot be rendered{given} ({reason}); {remedy}"
            ) from None
        if text.count(message) != 1:
            raise ModelError(
                f"tokenizer {name!r}: its chat template does not write the message once, as it is (a message "
                f"{message!r} became {text[:200]!r}); {remedy}"
            )
        ends.add(tuple(text.split(message)))
    if len(ends) > 1:
        raise ModelError(f"tokenizer {name!r}: what its chat template writes depends on the message; {remedy}")
    return ends.pop()


def for_any_tokenizer(prompt: Prompt) -> Prompt:
    """The prompt with a blank in all that reads like a control token, for a server whose tokenizer is not at hand."""
    return Prompt(prompt.words, tuple(MARK.sub(lambda mark: broken(mark[0]), text) for text in prompt.texts))
