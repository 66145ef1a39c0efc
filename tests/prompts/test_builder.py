import copy
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers import byte_level, word_level
from trsr_dist.errors import ModelError
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import WORDINGS, SummaryPrompt, block_instruction, recommend_instruction, recommend_text
from trsr_dist.records import Candidate, Sample
from trsr_dist.rows import common_prefix_length


def make_sample(num_candidates: int = 3, words: int = 6, recent: int = 4, summary_words: int = 12) -> Sample:
    def text(tag: str, count: int) -> str:
        return " ".join(f"{tag}{i}" for i in range(count))

    return Sample(
        user="u1",
        instruction=recommend_instruction("news"),
        summary=text("likes", summary_words),
        recent=tuple(text(f"old{n}x", words) for n in range(recent)),
        candidates=tuple(Candidate(f"i{n}", text(f"new{n}x", words + n), int(n == 0)) for n in range(num_candidates)),
    )


def test_golden_prompt() -> None:
    assert recommend_text("Do it.", "Likes tea.", ("green tea", "cups"), "black tea") == (
        "Do it.\n\n[Preference Summary]\nLikes tea.\n\n[Recent Items]\n- green tea\n- cups\n\n"
        "[Candidate]\nblack tea\n\nAnswer:"
    )
    assert "[Recent Items]\n(none)" in recommend_text("Do it.", "", (), "black tea")


def test_golden_summary_prompt() -> None:
    prompt = SummaryPrompt("Update.", previous=("Likes tea.",), items=("cups",))
    assert prompt.text() == "Update.\n\n[Summaries]\n- Likes tea.\n\n[Items]\n- cups\n\nSummary:"


@pytest.mark.parametrize("domain", WORDINGS)
def test_instructions_name_the_domain(domain: str) -> None:
    assert WORDINGS[domain].item in recommend_instruction(domain)
    assert WORDINGS[domain].items in block_instruction(domain)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_prefix_and_suffixes_are_the_whole_prompts(chat: bool) -> None:
    builder = PromptBuilder(byte_level(chat))
    assert builder.style == ("chat" if chat else "plain")
    sample = make_sample()
    user = builder.build(sample)
    for suffix, candidate in zip(user.suffixes, sample.candidates, strict=True):
        text = builder.render(sample.instruction, sample.summary, sample.recent, candidate.text)
        assert list(user.prefix + suffix) == builder.encode(text)
        assert len(suffix) >= 1
    assert len({suffix[0] for suffix in user.suffixes}) > 1, "the common prefix is as long as it can be"
    assert (user.labels, user.items, user.trims) == ((1, 0, 0), ("i0", "i1", "i2"), {})


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_answers_are_single_tokens_in_context(chat: bool) -> None:
    builder = PromptBuilder(byte_level(chat))
    prompt = builder.render("a", "b", (), "c")
    for answer, token in zip(("yes", "no"), builder.answer_ids, strict=True):
        spaced = answer if chat else f" {answer}"
        assert builder.encode(prompt + spaced) == [*builder.encode(prompt), token]


def test_answers_that_are_not_single_known_tokens_are_refused() -> None:
    with pytest.raises(ModelError, match="prompt.answers"):
        PromptBuilder(byte_level(), answers=("yes", "certainly not"))
    with pytest.raises(ModelError, match="prompt.answers"):
        PromptBuilder(word_level(("Answer", ":", "yes")))
    with pytest.raises(ModelError, match="no chat template"):
        PromptBuilder(byte_level(), style="chat")


def test_one_candidate_leaves_one_token_of_suffix() -> None:
    user = PromptBuilder(byte_level()).build(make_sample(num_candidates=1))
    assert len(user.suffixes[0]) == 1
    assert common_prefix_length([[1, 2], [1, 2, 3]]) == 1


def test_long_items_are_capped_and_counted() -> None:
    sample = make_sample(words=100)
    user = PromptBuilder(byte_level(), max_tokens=9999, max_candidate_tokens=20).build(sample)
    assert user.trims == {"candidates_capped": 3, "recent_capped": 4}
    assert max(map(len, user.suffixes)) < 40


def test_recent_items_of_the_builder_bound_those_of_the_sample() -> None:
    builder = PromptBuilder(byte_level(), recent_items=0)
    assert "old3x" not in builder.tokenizer.decode(builder.build(make_sample()).prefix)


def test_fingerprint_changes_with_what_changes_tokens() -> None:
    base = PromptBuilder(byte_level())
    assert base.fingerprint == PromptBuilder(byte_level(), **base.settings).fingerprint
    others = [
        PromptBuilder(byte_level(), recent_items=2),
        PromptBuilder(byte_level(), max_tokens=99),
        PromptBuilder(byte_level(vocab_size=420)),
        PromptBuilder(byte_level(chat=True)),
    ]
    assert len({base.fingerprint, *(builder.fingerprint for builder in others)}) == 5


def longest(user) -> int:  # noqa: ANN001
    return len(user.prefix) + max(map(len, user.suffixes))


LINES = PromptBuilder(byte_level())._lines
"""The tokenizer is checked once."""


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=4),
    st.lists(st.text(max_size=200), max_size=6),
    st.text(max_size=400),
    st.integers(90, 400),
)
def test_any_text_fits_or_is_refused(candidates: list[str], recent: list[str], summary: str, limit: int) -> None:
    sample = Sample("u", "Answer yes or no.", summary, tuple(recent), tuple(Candidate(c, c, 0) for c in candidates))
    builder = PromptBuilder(byte_level(), max_tokens=limit, max_candidate_tokens=64)
    builder._lines = LINES
    user = builder.build(sample)
    assert longest(user) <= limit
    assert all(user.suffixes)


def test_texts_without_blanks_are_cut_within() -> None:
    """Each cut keeps as much as fits: candidates stay different, and are not all cut to their first field's name."""
    candidates = tuple(Candidate(f"i{n}", f"title: 商品{n}号" + "中文商品标题很长" * 40, int(n == 0)) for n in range(3))
    sample = Sample("u", "Do it.", "喜欢茶" * 60, ("title: " + "很长的描述" * 200,), candidates)
    builder = PromptBuilder(byte_level(), max_tokens=400, max_candidate_tokens=120)
    user = builder.build(sample)
    texts = [builder.tokenizer.decode(suffix) for suffix in user.suffixes]
    assert len(set(texts)) == 3
    longest = len(user.prefix) + max(map(len, user.suffixes))
    assert 300 < longest <= 400
    assert user.trims["candidates_capped"] == 3


def test_templates_that_print_the_date_give_the_same_prompts_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    tokenizer = copy.deepcopy(byte_level(True))  # other tests share that one
    tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    prompts = []
    for day in (1, 2):
        clock = type("Clock", (), {"now": staticmethod(lambda day=day: datetime(2026, 3, day))})
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        raw = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        assert f"0{day} Mar 2026" in raw, "the template does read the clock"
        builder = PromptBuilder(tokenizer)
        prompts.append((builder.render("Do it.", "", (), "tea"), builder.fingerprint))
    assert prompts[0] == prompts[1]
    assert "Today: 26 Jul 2024" in prompts[0][0]
