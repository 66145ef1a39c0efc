"""A prompt's ids are those of its lines and words, whatever the texts: what tokenizers join is seen whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.prompts.test_builder import make_sample
from tests.prompts.test_encoder import MADE, spelled, tokenizer_of
from tests.real.assets import REAL
from tests.tokenizers import byte_level
from trsr_dist.prompts import lines
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.encoder import Encoder
from trsr_dist.prompts.lines import HOSTILE_TEXTS, LineEncoder
from trsr_dist.prompts.text import NO_SUMMARY, Prompt, recommend_prompt
from trsr_dist.words import cut_words, word_heads

COMMON = (
    "Match 12: Spain wins 3-1.",
    "a",
    "the",
    "'s",
    "(none)",
    "e\u0301t\u00e9",
    "\u0301",
    "> </b>",
    "x=1;",
    "\u200b",
)


def by_characters(merges: Sequence[tuple[str, str]], normalizer: Any = None) -> PreTrainedTokenizerFast:
    """BPE on whole texts, nothing split before, as SentencePiece has it; with these merges."""
    letters = [chr(n) for n in range(32, 127)] + ["\n", "\u2581"]
    vocabulary = {token: n for n, token in enumerate(["<unk>", *letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>"))
    if normalizer:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


BLANKS = normalizers.Replace(" ", "\u2581")
JOINING: dict[str, Callable[[], Any]] = {
    "line ends joined": cache(lambda: by_characters([("\n", "a"), ("\n", "-")])),
    "any blanks joined": cache(lambda: by_characters([(chr(n), " ") for n in range(33, 127)])),
    "a tag joined": cache(lambda: by_characters([("<", "/"), ("\u2581", "</"), (">", "\u2581</")], BLANKS)),
    "dummy prefix": cache(lambda: by_characters(WORDS, normalizers.Sequence([normalizers.Prepend("\u2581"), BLANKS]))),
    "line ends become blanks": cache(lambda: by_characters([], normalizers.Replace("\n", " "))),
    "blanks collapse": cache(lambda: by_characters([(" ", "a")], normalizers.Strip())),
}
WORDS = (("\u2581", "a"), ("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("n", "s"))


def tokenizer(name: str) -> Any:
    return JOINING[name]() if name in JOINING else tokenizer_of(name)


@cache
def texts_of(name: str) -> st.SearchStrategy[str]:
    added = spelled(tokenizer(name))
    pieces = [*COMMON, *HOSTILE_TEXTS, *added, *(text[: len(text) // 2] for text in added)]
    piece = st.sampled_from(pieces) | st.sampled_from(HOSTILE_TEXTS) | st.text(max_size=4)
    return st.lists(piece, max_size=4).map(" ".join) | st.lists(piece, max_size=4).map("".join)


@pytest.mark.parametrize("name", [*MADE, *JOINING, *REAL])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_ids_are_those_of_whole_prompts(name: str, data: st.DataObject) -> None:
    encoder, parts = encoders(name, data.draw(st.sampled_from(["plain", "auto"])))
    texts = texts_of(name).map(encoder.value)
    summary, recent, candidates = data.draw(
        st.tuples(texts, st.lists(texts, max_size=3), st.lists(texts, min_size=1, max_size=3))
    )
    prompt = recommend_prompt("Do it.", summary, recent, candidates[0])
    found = parts.encode(prompt, candidates)
    prompts = [Prompt(prompt.words, (*prompt.texts[:-1], text or NO_SUMMARY)) for text in candidates]
    assert [list(found.prefix + rest) for rest in found.rests] == encoder.encode(prompts)
    assert found.lengths == [len(found.prefix + rest) for rest in found.rests]
    assert [parts.count(text) for text in candidates] == [encoder.count(text) for text in candidates]


@cache
def encoders(name: str, style: str) -> tuple[Encoder, LineEncoder]:
    encoder = Encoder(tokenizer(name), style)
    return encoder, LineEncoder(encoder)


@pytest.mark.parametrize("name", ["byte-level", "not special", "end token", "a tag joined", "dummy prefix", *REAL])
def test_tokenizers_of_today_need_no_whole_prompts(name: str) -> None:
    encoder = Encoder(tokenizer(name))
    parts = LineEncoder(encoder)
    assert parts.is_exact
    with patch.object(encoder, "encode", wraps=encoder.encode) as whole:
        parts.encode(recommend_prompt("Do it.", "Likes tea, cups.", ("tea: 1", "a cup"), "x"), ["pot; 2.", "(tea)"])
    assert not whole.called


@pytest.mark.parametrize("name", ["line ends joined", "any blanks joined", "llama2-like", "gemma-like", "tiny base"])
def test_tokenizers_that_join_lines_get_whole_prompts_with_one_line_in_the_log(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    parts = LineEncoder(Encoder(tokenizer(name)))
    with caplog.at_level(logging.INFO, "trsr.prompts"):
        for _ in range(2):
            encoded = parts.encode(recommend_prompt("Do it.", "a", ("a",), "a"), ["a", "b"])
    assert not parts.is_exact and encoded.prefix == ()
    assert [record.message.count("prompts are tokenized whole") for record in caplog.records] == [1]


def test_a_text_with_a_token_that_spans_a_cut_is_seen_whole() -> None:
    encoder = Encoder(tokenizer("a tag joined"))
    parts = LineEncoder(encoder)
    prompt = recommend_prompt("Do it.", "s", (), "x")
    assert parts.is_exact
    with patch.object(encoder, "encode", wraps=encoder.encode) as whole:
        found = parts.encode(prompt, ["<b> </b>", "<b> <b> a/b"])
    assert [len(call.args[0]) for call in whole.call_args_list] == [1]
    ids = encoder.ids([str(Prompt(prompt.words, ("s", text))) for text in ("<b> </b>", "<b> <b> a/b")])
    assert [list(found.prefix + rest) for rest in found.rests] == ids


def test_an_item_with_a_control_token_costs_its_own_prompt_only() -> None:
    encoder = Encoder(byte_level(chat=True))
    parts = LineEncoder(encoder)
    prompt = recommend_prompt("Do it.", "s", (), "x")
    assert parts.is_exact
    with patch.object(encoder, "encode", wraps=encoder.encode) as whole:
        found = parts.encode(prompt, ["tea", "a <|end|> b", "cup"])
    assert [len(call.args[0]) for call in whole.call_args_list] == [1]
    assert len({rest.count(byte_level().eos_token_id) for rest in found.rests}) == 1


class Reads:
    """What the tokenizer is given."""

    def __init__(self, encoder: Encoder) -> None:
        self.calls: list[Sequence[str]] = []
        for name in ("part_ids", "_tokenize"):
            original = getattr(encoder, name)
            setattr(encoder, name, lambda texts, *rest, run=original: self.calls.append(texts) or run(texts, *rest))

    def take(self) -> tuple[int, int]:
        """Calls and characters since the last time."""
        counts = len(self.calls), sum(len(text) for texts in self.calls for text in texts)
        self.calls.clear()
        return counts


def test_what_was_read_once_is_not_read_again() -> None:
    builder = PromptBuilder(byte_level(chat=True), max_tokens=4096)
    reads = Reads(builder.encoder)
    sample = make_sample(num_candidates=21, words=12, summary_words=60)
    first = builder.build(sample)
    reads.take()
    assert builder.build(sample) == first and reads.take() == (0, 0), "nothing is new"
    other = make_sample(num_candidates=21, words=12, summary_words=61)
    builder.build(other)
    (new,) = set(other.summary.split()) - set(sample.summary.split())
    num_calls, num_characters = reads.take()
    assert num_calls == 1 and num_characters < len(new) + 60, "the new word, and the last one with the line end"


def test_a_user_of_new_words_is_read_once_and_in_one_call() -> None:
    builder = PromptBuilder(byte_level(), max_tokens=4096, max_candidate_tokens=400)
    builder.build(make_sample())
    reads = Reads(builder.encoder)
    sample = make_sample(num_candidates=21, words=12, summary_words=100)
    builder.build(sample)
    texts = [sample.summary, *sample.recent, *(candidate.text for candidate in sample.candidates)]
    num_calls, num_characters = reads.take()
    assert num_calls == 1 and num_characters < 1.5 * sum(map(len, texts)), "with an anchor for each word"


@pytest.mark.parametrize("limit", [0, 3000])
def test_memory_is_bounded_and_ids_do_not_depend_on_it(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free, builder = PromptBuilder(byte_level()), PromptBuilder(byte_level())
    sizes = []
    for words in range(3, 20):
        sample = make_sample(words=words, summary_words=words)
        expected = free.build(sample)
        with monkeypatch.context() as patched:
            patched.setattr(lines, "MAX_CHARACTERS", limit)
            assert builder.build(sample) == expected
        sizes.append(len(builder._lines._lines))
    assert max(sizes) < 60 < len(free._lines._lines)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60) | st.text("ab \u5546\u200b", max_size=80))
def test_word_heads_are_the_cuts(text: str) -> None:
    heads = word_heads(text)
    assert heads == [cut_words(text, n) for n in range(len(heads))]
    assert cut_words(text, len(heads)) == heads[-1]
