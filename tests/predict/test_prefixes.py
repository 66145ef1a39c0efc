"""Kept prefixes change no score and save what they hold: tokens are counted where they enter the model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.model.world import CONFIGS, make_model, make_user, model_config, recommender
from trsr_dist.model.recommender import Recommender
from trsr_dist.predict.prefixes import PrefixCache
from trsr_dist.predict.ranker import score
from trsr_dist.records import TokenizedUser

ROW_TOKENS = 256
MANY_BYTES = 1 << 30
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4
"""Keys and values of three layers, two heads of 16, float32."""


@pytest.fixture(scope="module")
def model() -> Recommender:
    return recommender(make_model(model_config()), "cpu").eval()


@pytest.fixture
def tokens(model: Recommender) -> Iterator[list[int]]:
    """Tokens of each forward pass."""
    counts: list[int] = []
    hook = model.causal.model.embed_tokens.register_forward_hook(lambda *args: counts.append(args[-1].shape[1]))
    yield counts
    hook.remove()


def others(user: TokenizedUser, *lengths: int) -> TokenizedUser:
    """The same user with other candidates."""
    return replace(make_user(f"{user.user} again", 1, lengths), user=user.user, prefix=user.prefix)


def assert_equal(cache: PrefixCache, model: Recommender, users: list[TokenizedUser]) -> None:
    for found, expected in zip(cache.score_users(users), score(model, ROW_TOKENS, users), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_any_mixture_of_users_has_the_scores_of_no_cache(kind: str, backend: str) -> None:
    model, draw = recommender(make_model(model_config(kind)), backend).eval(), random.Random(kind)
    cache = PrefixCache(model, ROW_TOKENS, 400 * TOKEN_BYTES)
    known = [make_user(f"u{number}", 20 + 9 * number, (5, 9, 2), 12) for number in range(8)]
    for _ in range(6):
        users = [others(user, *draw.choices(range(1, 20), k=draw.randint(1, 12))) for user in draw.sample(known, 5)]
        assert_equal(cache, model, users)
        assert 0 < cache.num_bytes <= 400 * TOKEN_BYTES


def test_a_second_request_computes_its_suffixes_alone(model: Recommender, tokens: list[int]) -> None:
    cache, user = PrefixCache(model, ROW_TOKENS, MANY_BYTES), make_user("u", 90, (6, 7))
    cache.score_users([user, make_user("v", 40, (3,), 0)])
    cache.score_users([others(user, 5, 4, 11)])
    assert tokens == [90 + 13 + 40 + 3, 5 + 4 + 11]
    renamed = replace(others(user, 8), user="someone else")
    cache.score_users([renamed, make_user("w", 30, (2,))])
    assert tokens[2:] == [8, 32], "told by token ids, and known users apart from new ones"
    changed = replace(user, prefix=(*user.prefix[:45], 5, *user.prefix[46:]))
    cache.score_users([changed])
    assert tokens[4:] == [90 + 13], "another history is another prefix"


def test_candidates_that_end_the_prefix_elsewhere_read_it_too(model: Recommender, tokens: list[int]) -> None:
    cache, user = PrefixCache(model, ROW_TOKENS, MANY_BYTES), make_user("u", 90, (6, 7))
    cache.score_users([user])
    longer = replace(user, prefix=(*user.prefix, 7, 8, 9))
    shorter = replace(user, prefix=user.prefix[:86])
    alone = replace(others(user, 1), prefix=(*user.prefix, *range(20, 40)))
    for number, request in enumerate((longer, shorter, alone)):
        before = len(tokens)
        cache.score_users([request])
        assert tokens[before:] == [(3 + 6 + 3 + 7, 6 + 7, 20 + 1)[number]]
        assert_equal(cache, model, [request])


def test_users_who_begin_alike_are_kept_whole(model: Recommender, tokens: list[int]) -> None:
    """One candidate at a time, too: the instruction is what every prompt begins with."""
    cache, users = PrefixCache(model, ROW_TOKENS, MANY_BYTES), [make_user(name, 80, (4,), 30) for name in "abc"]
    for user in users:
        cache.score_users([user])
    tokens.clear()
    for user in users:
        assert_equal(cache, model, [others(user, 7)])
    assert tokens[::2] == [7, 7, 7], "of each pass the second one is that of no cache"


def test_long_requests_and_twins_read_what_their_first_row_left(model: Recommender, tokens: list[int]) -> None:
    cache, user = PrefixCache(model, ROW_TOKENS, MANY_BYTES), make_user("u", 90, (10,) * 40)
    cache.score_users([user])
    assert sum(tokens) == 90 + 400
    assert_equal(cache, model, [user, user, others(user, 30)])


def test_the_least_recently_used_prefix_makes_room(model: Recommender, tokens: list[int]) -> None:
    cache = PrefixCache(model, ROW_TOKENS, 200 * TOKEN_BYTES)
    first, second, third = (make_user(name, 80, (3,)) for name in "abc")
    for user in (first, second, first, third):
        cache.score_users([user])
    assert cache.num_bytes == 160 * TOKEN_BYTES
    tokens.clear()
    for user in (first, third, second):
        cache.score_users([user])
    assert tokens == [3, 3, 83]
    cache.score_users([make_user("long", 201, (3,))])
    assert cache.num_bytes == 160 * TOKEN_BYTES, "what is above the limit alone drives nobody out"


def test_memory_is_that_of_the_tensors(model: Recommender) -> None:
    cache = PrefixCache(model, ROW_TOKENS, 150 * TOKEN_BYTES)
    cache.score_users([make_user(f"u{number}", 60, (4,), 12) for number in range(5)])
    storages = [x.untyped_storage().nbytes() for kept in cache._kept.values() for pair in kept for x in pair]
    assert sum(storages) == cache.num_bytes == 120 * TOKEN_BYTES
