"""Rows hold every candidate once, within the limit, whatever the lengths; parts are shared out by cost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from trsr_dist.evaluate.passes import USERS_PER_PART, assign_parts, pack_part, split_parts
from trsr_dist.records import TokenizedUser


def user_of(prefix: int, suffixes: list[int]) -> TokenizedUser:
    texts = tuple((0,) * length for length in suffixes)
    return TokenizedUser("u", (0,) * prefix, texts, (0,) * len(texts), tuple(map(str, range(len(texts)))))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(1, 20), min_size=1, max_size=30)), min_size=1),
    st.integers(60, 200),
)
def test_every_candidate_has_one_place(shapes: list[tuple[int, list[int]]], row_tokens: int) -> None:
    users = [user_of(*shape) for shape in shapes]
    rows = pack_part(users, row_tokens)
    places = [(entry.user, candidate) for row in rows for entry in row for candidate in entry.candidates]
    assert sorted(places) == [(u, c) for u, user in enumerate(users) for c in range(len(user.suffixes))]
    for row in rows:
        assert sum(users[entry.user].choose(entry.candidates).num_tokens for entry in row) <= row_tokens


def test_a_prompt_longer_than_a_row_has_a_separate_row() -> None:
    rows = pack_part([user_of(100, [10, 10]), user_of(5, [5])], row_tokens=50)
    assert sorted(len(row) for row in rows) == [1, 1, 1]


def test_parts_cover_the_split() -> None:
    parts = split_parts(2 * USERS_PER_PART + 3)
    assert [user for part in parts for user in part] == list(range(2 * USERS_PER_PART + 3))
    assert split_parts(0) == []


def test_parts_are_shared_out_by_cost() -> None:
    shares = assign_parts([9, 1, 1, 1, 5, 1], num_workers=2)
    assert sorted(part for share in shares for part in share) == list(range(6))
    assert [0] in shares
    assert assign_parts([1], num_workers=3) == [[0], [], []]
