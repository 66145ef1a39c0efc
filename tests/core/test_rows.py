import numpy as np

from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow, pack_row


def user(name: str, prefix: list[int], *suffixes: list[int]) -> TokenizedUser:
    labels = tuple(int(i == 0) for i in range(len(suffixes)))
    return TokenizedUser(name, tuple(prefix), tuple(map(tuple, suffixes)), labels, tuple(f"{name}{i}" for i in labels))


def sequences(row: PackedRow) -> list[list[int]]:
    """Every prompt of a row again as a sequence of its own, read along the tree."""
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
    assert empty.token_ids.dtype == np.int64
