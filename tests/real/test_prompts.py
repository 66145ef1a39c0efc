"""Real users' prompts under real tokenizers: those that the plain way makes of the same text, with single answers."""

from __future__ import annotations

import pytest

from tests.real.assets import NAMES, real_tokenizer
from trsr_dist.config.kinds import NO_THOUGHTS
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import recommend_text
from trsr_dist.records import Sample, TokenizedUser

NUM_USERS = 200
BEGIN_WITH_BOS = ("llama2", "llama3_1", "gemma3")
CASES = [(name, style) for name in NAMES for style in ("plain", "chat")]


def plain_texts(builder: PromptBuilder, sample: Sample) -> list[str]:
    """Whole prompts, written by the library's own template."""
    texts = [recommend_text(sample.instruction, sample.summary, sample.recent, c.text) for c in sample.candidates]
    if builder.style == "plain":
        return texts
    options = {"tokenize": False, "add_generation_prompt": True, **NO_THOUGHTS}
    return [builder.tokenizer.apply_chat_template([{"role": "user", "content": text}], **options) for text in texts]


def whole(user: TokenizedUser) -> list[list[int]]:
    return [list(user.prefix + suffix) for suffix in user.suffixes]


def ids_of(builder: PromptBuilder, texts: list[str]) -> list[list[int]]:
    return builder.tokenizer(texts, add_special_tokens=builder.style == "plain")["input_ids"]


@pytest.mark.parametrize(("name", "style"), CASES)
def test_prefix_and_suffix_are_the_whole_prompt_and_answers_single_tokens(
    name: str, style: str, users: list[Sample]
) -> None:
    tokenizer = real_tokenizer(name)
    builder = PromptBuilder(tokenizer, style, max_tokens=4096, chat_template_kwargs=NO_THOUGHTS)
    answers = dict(zip(("yes", "no"), builder.answer_ids, strict=True))
    assert len(users) >= NUM_USERS
    for sample in users[:NUM_USERS]:
        user, texts = builder.build(sample), plain_texts(builder, sample)
        ids = ids_of(builder, texts)
        assert whole(user) == ids and not user.trims
        assert len({suffix[0] for suffix in user.suffixes}) > 1, "the longest common prefix"
        if name in BEGIN_WITH_BOS:
            assert all(prompt[0] == tokenizer.bos_token_id not in prompt[1:] for prompt in ids)
        for answer, token in answers.items():
            assert [*ids[0], token] in ids_of(builder, [texts[0] + answer, f"{texts[0]} {answer}"])
    if name == "qwen3" and style == "chat":
        assert tokenizer.decode(ids[0]).endswith("<think>\n\n</think>\n\n"), "answered without a thought"


@pytest.mark.parametrize(("name", "style"), CASES)
def test_trimmed_prompts_keep_to_the_limit_and_whole_where_they_must(
    name: str, style: str, users: list[Sample]
) -> None:
    """The limit is the length of every second user's longest prompt."""
    options = {"style": style, "chat_template_kwargs": NO_THOUGHTS}
    untrimmed = PromptBuilder(real_tokenizer(name), max_tokens=4096, **options)
    limit = sorted(max(map(len, whole(untrimmed.build(sample)))) for sample in users[:40])[20]
    builder, trimmed = PromptBuilder(real_tokenizer(name), max_tokens=limit, **options), 0
    for sample in users[:NUM_USERS]:
        user = builder.build(sample)
        assert max(map(len, whole(user))) <= limit
        read = builder.tokenizer.decode(whole(user)[0])
        assert sample.instruction in read and read.rpartition("[Candidate]")[2].count("Answer:") == 1
        trimmed += bool(user.trims)
    assert NUM_USERS / 4 < trimmed < NUM_USERS
