"""From a sample to token ids: one shared prefix, one suffix a candidate, and the two answer tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trsr_dist.errors import ModelError
from trsr_dist.hashing import digest
from trsr_dist.prompts.encoder import Encoder
from trsr_dist.prompts.lines import Encoded, LineEncoder, Memory
from trsr_dist.prompts.text import WORDING_VERSION, recommend_prompt
from trsr_dist.prompts.trimming import CHARACTERS_PER_TOKEN, Parts, cap_text, head_of, trim
from trsr_dist.records import Sample, TokenizedUser
from trsr_dist.rows import common_prefix_length
from trsr_dist.words import count_words


class PromptBuilder:
    """Writes and tokenizes prompts the same way in training, evaluation and prediction.

    Args:
        tokenizer: a Hugging Face tokenizer.
        style: ``plain``, ``chat`` or ``auto`` (chat where the tokenizer has a template).
        max_tokens: limit of one prompt.
        max_candidate_tokens: limit of one item's text, candidate or recent.
        recent_items: at most this many recent items are shown.
        answers: the two answer words, positive first.
        chat_template_kwargs: further variables of the chat template.

    Raises:
        ModelError: an answer is not a single, known token where a prompt ends, or both are the same token; or the chat
            template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        style: str = "auto",
        max_tokens: int = 1024,
        max_candidate_tokens: int = 256,
        recent_items: int = 5,
        answers: tuple[str, str] = ("yes", "no"),
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.encoder = Encoder(tokenizer, style, self.chat_template_kwargs)
        self._lines = LineEncoder(self.encoder)
        self._items: Memory[str, tuple[str, str]] = Memory()
        self.style = self.encoder.style
        self.max_tokens = max_tokens
        self.max_candidate_tokens = max_candidate_tokens
        self.recent_items = recent_items
        self.answers = answers
        self.answer_ids = self._resolve_answers()

    @property
    def settings(self) -> dict[str, Any]:
        """What ``PromptBuilder(tokenizer, **settings)`` needs; kept with checkpoints and merged models."""
        return {
            "style": self.style,
            "max_tokens": self.max_tokens,
            "max_candidate_tokens": self.max_candidate_tokens,
            "recent_items": self.recent_items,
            "answers": list(self.answers),
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    @property
    def fingerprint(self) -> str:
        """Changes whenever token ids of a prompt could: names token-length indexes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        probe = self.encode(self.render("instruction", "summary", ("a", "b"), "candidate 123"))
        return digest([vocabulary, probe, list(self.answer_ids), self.settings, WORDING_VERSION])[:16]

    def render(self, instruction: str, summary: str, recent: Sequence[str], candidate: str) -> str:
        """The prompt as the model reads it, for any texts: what would be a control token or a section mark is not."""
        value = self.encoder.value
        prompt = recommend_prompt(instruction, value(summary), [value(text) for text in recent], value(candidate))
        return self.encoder.text(prompt)

    def texts(self, sample: Sample) -> list[str]:
        """What the model reads, one text a candidate; trimming, which is done on tokens, left out."""
        recent = sample.recent[-self.recent_items :] if self.recent_items else ()
        return [self.render(sample.instruction, sample.summary, recent, one.text) for one in sample.candidates]

    def encode(self, text: str) -> list[int]:
        """Token ids of a whole prompt as ``render`` gives it."""
        return self.encoder.ids([text])[0]

    def build(self, sample: Sample) -> TokenizedUser:
        """Trim once for all candidates, tokenize, split off the common prefix.

        Raises:
            DataError: the instruction alone does not fit.
        """
        encoded, trims = self._encode_within_limit(sample)
        rests = encoded.rests
        length = common_prefix_length(rests)
        return TokenizedUser(
            user=sample.user,
            prefix=encoded.prefix + rests[0][:length],
            suffixes=tuple(rest[length:] for rest in rests),
            labels=tuple(candidate.label for candidate in sample.candidates),
            items=tuple(candidate.item for candidate in sample.candidates),
            trims=trims,
        )

    def _encode_within_limit(self, sample: Sample) -> tuple[Encoded, dict[str, int]]:
        self._items.empty_if_full()
        whole, counts = self._whole(sample)
        parts = whole
        encoded = self._encode_all(sample.instruction, parts)
        # What is cut is searched for with the prompts that are too long, and then tried with all: mostly one decides.
        probes: list[int] = []
        while max(lengths := encoded.lengths) > self.max_tokens:
            probes.append(lengths.index(max(lengths)))
            longest = max(map(count_words, whole.candidates))
            chosen = replace(whole, candidates=tuple(whole.candidates[place] for place in probes))
            cuts = trim(
                chosen,
                lambda tried: max(self._encode_all(sample.instruction, tried).lengths) <= self.max_tokens,
                longest,
                sample.user,
            )
            parts = cuts.apply(whole)
            encoded = self._encode_all(sample.instruction, parts)
        # Different texts that became the same by cutting: the model cannot tell these candidates apart.
        counts["candidates_equal"] -= len(set(parts.candidates))
        return encoded, parts.trims | {name: count for name, count in counts.items() if count}

    def _whole(self, sample: Sample) -> tuple[Parts, dict[str, int]]:
        """The sample's texts as they may stand in a prompt, each item capped; how many were, and how many candidates
        differ."""
        summary = self.encoder.value(sample.summary)
        head = head_of(summary, CHARACTERS_PER_TOKEN * self.max_tokens)
        recent = [self._item(text) for text in sample.recent[-self.recent_items :]] if self.recent_items else []
        items = [self._item(candidate.text) for candidate in sample.candidates]
        counts = {
            "recent_capped": sum(text != capped for text, capped in recent),
            "candidates_capped": sum(text != capped for text, capped in items),
            "candidates_equal": len({text for text, _ in items}),
        }
        num_cut = count_words(summary) - count_words(head) if head != summary else 0
        shown, candidates = (tuple(capped for _, capped in group) for group in (recent, items))
        return Parts(head, shown, candidates, summary_words_cut=num_cut), counts

    def _item(self, raw: str) -> tuple[str, str]:
        """An item's text as it may stand in a prompt, and capped."""
        if raw in self._items:
            return self._items[raw]
        text, limit = self.encoder.value(raw), self.max_candidate_tokens
        head = head_of(text, CHARACTERS_PER_TOKEN * limit)
        found = text, cap_text(head, limit, self._count)
        self._items.keep(raw, found, len(raw))
        return found

    def _encode_all(self, instruction: str, parts: Parts) -> Encoded:
        prompt = recommend_prompt(instruction, parts.summary, parts.recent, parts.candidates[0])
        return self._lines.encode(prompt, parts.candidates)

    def _count(self, text: str) -> int:
        """Tokens of a bare text; short texts cannot exceed the limit (a token holds at least one byte)."""
        if len(text.encode()) <= self.max_candidate_tokens:
            return len(text)
        return self._lines.count(text)

    def _resolve_answers(self) -> tuple[int, int]:
        """Ids of the answers in context: the prompt's own tokens must stay, and one token must follow.

        A bare lookup of "yes" in the vocabulary gives another token, or none, with many tokenizers.
        """
        prompt = self.render("instruction", "summary", ("item",), "candidate")
        base = self.encode(prompt)
        spaced = [f" {answer}" for answer in self.answers]
        variants = [list(self.answers), spaced] if prompt[-1].isspace() else [spaced, list(self.answers)]
        for variant in variants:
            whole = [self.encode(prompt + answer) for answer in variant]
            ids = [one[-1] for one in whole if one[:-1] == base and one[-1] != self.tokenizer.unk_token_id]
            if len(set(ids)) == 2:
                return ids[0], ids[1]
        raise ModelError(
            f"tokenizer {getattr(self.tokenizer, 'name_or_path', '')!r}: {self.answers} are not two different single "
            f"tokens after {prompt[-20:]!r}; choose other words with prompt.answers"
        )
