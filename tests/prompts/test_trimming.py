"""Cuts are searched for with the longest prompts, and are those that a search with all prompts finds."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.prompts.test_builder import make_sample
from tests.tokenizers import byte_level
from trsr_dist.errors import DataError
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import recommend_instruction
from trsr_dist.prompts.trimming import Parts, cap_text
from trsr_dist.records import Candidate, Sample
from trsr_dist.words import count_words, cut_words

LINES = PromptBuilder(byte_level())._lines
"""The tokenizer is checked once."""
CAPPED = ("recent_capped", "candidates_capped", "candidates_equal")
WORDS = ["tennis", "quiet", "final", "rain", "x1", "third", "\u00fcberraschend", "\u5546\u54c1", "http://a.b/c?d=e"]


def largest(high: int, good: Callable[[int], bool]) -> int:
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def search_with_all(parts: Parts, fits: Callable[[Parts], bool]) -> Parts:
    """The plain search: every step looks at every prompt."""
    while not fits(parts) and len(parts.recent) > 1:
        parts = replace(parts, recent=parts.recent[1:], recent_dropped=parts.recent_dropped + 1)
    if not fits(parts):
        whole, words = parts, count_words(parts.summary)

        def shorter(kept: int) -> Parts:
            return replace(whole, summary=cut_words(whole.summary, kept), summary_words_cut=words - kept)

        parts = shorter(largest(words, lambda kept: fits(shorter(kept))))
    if not fits(parts):
        before = parts

        def capped(kept: int) -> Parts:
            recent, candidates = (tuple(cut_words(t, kept) for t in ts) for ts in (before.recent, before.candidates))
            num_cut = sum(map(count_words, (*before.recent, *before.candidates)))
            num_cut -= sum(map(count_words, (*recent, *candidates)))
            return replace(before, recent=recent, candidates=candidates, item_words_cut=num_cut)

        longest = max(map(count_words, (*parts.recent, *parts.candidates)))
        parts = capped(largest(longest, lambda kept: fits(capped(kept))))
    assert fits(parts)
    return parts


def texts(max_words: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(WORDS), max_size=max_words).map(" ".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(texts(60), min_size=1, max_size=10),
    st.lists(texts(40), max_size=6),
    texts(120),
    st.integers(100, 400),
    st.sampled_from([16, 64, 256]),
)
def test_the_cuts_are_those_of_a_search_with_all(
    candidates: list[str], recent: list[str], summary: str, limit: int, cap: int
) -> None:
    builder = PromptBuilder(byte_level(), max_tokens=limit, max_candidate_tokens=cap)
    builder._lines = LINES
    items = tuple(Candidate(str(place), f"title: {place} {text}".strip(), 0) for place, text in enumerate(candidates))
    sample = Sample("u", recommend_instruction("news"), summary, tuple(recent), items)
    user = builder.build(sample)
    shown, capped = (
        tuple(cap_text(text, cap, builder._count) for text in group)
        for group in (recent[-5:], [item.text for item in items])
    )
    whole = Parts(summary, shown, capped)
    expected = search_with_all(
        whole, lambda tried: max(builder._encode_all(sample.instruction, tried).lengths) <= limit
    )
    encoded = builder._encode_all(sample.instruction, expected)
    assert [user.prefix + suffix for suffix in user.suffixes] == [encoded.prefix + rest for rest in encoded.rests]
    assert {name: n for name, n in user.trims.items() if name not in CAPPED} == expected.trims


def test_few_prompts_are_encoded_while_the_cuts_are_searched_for() -> None:
    sample = make_sample(num_candidates=60, recent=5, summary_words=200)
    builder = PromptBuilder(byte_level(), max_tokens=500)
    with patch.object(builder, "_encode_all", wraps=builder._encode_all) as encode:
        user = builder.build(sample)
    assert user.trims["summary_words_cut"]
    sizes = [len(call.args[1].candidates) for call in encode.call_args_list]
    assert sizes.count(60) <= 4 and len(sizes) > 10
    assert max(size for size in sizes if size != 60) <= 3


def test_candidates_that_cutting_made_equal_are_counted() -> None:
    candidates = tuple(Candidate(str(n), "the same words " * 10 + str(n), int(n == 0)) for n in range(4))
    sample = replace(make_sample(recent=0), candidates=(*candidates, replace(candidates[0], item="again")))
    user = PromptBuilder(byte_level(), max_tokens=9999, max_candidate_tokens=20).build(sample)
    assert user.trims == {"candidates_capped": 5, "candidates_equal": 3}
    assert "candidates_equal" not in PromptBuilder(byte_level(), max_tokens=9999).build(sample).trims


def test_what_cannot_fit_is_an_error_for_any_number_of_candidates() -> None:
    with pytest.raises(DataError, match=r"user 'u1'.*raise prompt.max_tokens"):
        PromptBuilder(byte_level(), max_tokens=20).build(make_sample(num_candidates=30))
