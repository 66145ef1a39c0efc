import numpy as np
import pytest

from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow, filler_row, head_length, pack_row


def user(name: str, prefix: list[int], *suffixes: list[int]) -> TokenizedUser:
    labels = tuple(int(i == 0) for i in range(len(suffixes)))
    return TokenizedUser(name, tuple(prefix), tuple(map(tuple, suffixes)), labels, tuple(f"{name}{i}" for i in labels))


def sequences(row: PackedRow) -> list[list[int]]:
    """Every prompt of a row again as a separate sequence, read along the tree."""
    start, suffix, found = row.head_length, row.suffix_start, []
    for length, lengths in zip(row.prefix_lengths, row.suffix_lengths, strict=True):
        prefix = [*row.token_ids[: row.head_length], *row.token_ids[start : start + length - row.head_length]]
        start += length - row.head_length
        for size in lengths:
            found.append([int(token) for token in (*prefix, *row.token_ids[suffix : suffix + size])])
            suffix += size
    return found


def test_a_row_holds_each_shared_part_once() -> None:
    one, two = user("a", [1, 2, 3, 4], [5], [6, 7]), user("b", [1, 2, 9], [8, 8, 8])
    row = pack_row([one, two])
    assert row.head_length == 2
    assert row.token_ids.tolist() == [1, 2, 3, 4, 9, 5, 6, 7, 8, 8, 8]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 2, 4, 4, 5, 3, 4, 5]
    assert row.answer_index.tolist() == [5, 7, 10]
    assert row.group.tolist() == [0, 0, 1]
    assert row.labels.tolist() == [1, 0, 1]
    assert (row.users, row.items) == (("a", "b"), ("a1", "a0", "b1"))
    assert (row.prefix_lengths, row.suffix_lengths) == ((4, 3), ((1, 2), (3,)))
    assert (row.num_tokens, row.num_answers, row.suffix_start) == (11, 3, 5)
    assert sequences(row) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 9, 8, 8, 8]]
    assert row.num_separate_tokens == 5 + 6 + 6


def test_equal_prefixes_keep_a_token_of_their_own() -> None:
    row = pack_row([user("a", [1, 2], [3]), user("b", [1, 2], [4])])
    assert row.head_length == 1
    assert sequences(row) == [[1, 2, 3], [1, 2, 4]]


def test_one_user_and_no_user() -> None:
    assert pack_row([user("a", [1, 2], [3], [4])]).head_length == 0
    empty = pack_row([])
    assert empty.num_tokens == empty.num_answers == empty.num_separate_tokens == 0
    for row in (empty, pack_row([user("a", [1, 2], [3])])):
        arrays = (row.token_ids, row.position_ids, row.answer_index, row.labels, row.group)
        assert {array.dtype for array in arrays} == {np.dtype(np.int64)}


def test_a_filler_is_one_prompt_of_two_tokens_whose_answer_is_no() -> None:
    row = filler_row((8, 9))
    assert (row.users, row.items, row.labels.tolist()) == (("",), ("",), [0])
    assert (row.token_ids.tolist(), row.position_ids.tolist(), row.answer_index.tolist()) == ([8, 9], [0, 1], [1])


@pytest.mark.parametrize(
    ("prefixes", "expected"),
    [
        ([], 0),
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2, 3, 4], [1, 2]], 1),
        ([[1, 2], [1, 2, 3, 4]], 1),
        ([[1], [1, 2]], 0),
        ([[1, 2, 3], [9, 2, 3]], 0),
        ([[1, 2, 3, 4], [1, 2, 3, 4], [1, 9, 8, 4]], 1),
        ([[1, 2, 3, 4], [1, 9, 3, 4], [1, 2, 8, 4]], 1),
        ([[1, 9, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]], 1),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 8, 5], [1, 2, 3, 9, 9]], 3),
    ],
)
def test_the_head_ends_at_the_first_difference_of_any(prefixes: list[list[int]], expected: int) -> None:
    assert head_length(prefixes) == expected
