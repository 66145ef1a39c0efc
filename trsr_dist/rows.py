"""The packed row: several users' prompts as one sequence, each shared part once. Pure: numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trsr_dist.records import TokenizedUser


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Users laid out as a tree of depth three: ``[H | P_1 ... P_U | C_11 ... C_1n | C_21 ... ]``.

    H, the head, is what all prefixes of the row begin with (the instruction), P_u the rest of user u's prefix, C_ui the
    suffix of a candidate. Shared parts first make every operand of the shared-prefix attention a slice. Positions go on
    along the tree. A row without users is a rank's padding and has weight 0.
    """

    token_ids: np.ndarray
    """int64, shape (num_tokens,)."""
    position_ids: np.ndarray
    """int64, shape (num_tokens,)."""
    answer_index: np.ndarray
    """int64, shape (num_answers,): the last token of every suffix, whose logits are the answer's."""
    labels: np.ndarray
    """int64, shape (num_answers,): 1 for yes."""
    group: np.ndarray
    """int64, shape (num_answers,): index of the user an answer belongs to."""
    head_length: int
    """Tokens of H; 0 where a row has one user."""
    prefix_lengths: tuple[int, ...]
    """Tokens of each user's whole prefix, the head included."""
    suffix_lengths: tuple[tuple[int, ...], ...]
    users: tuple[str, ...]
    items: tuple[str, ...]
    """Item id of each answer, in the order of ``answer_index``."""
    teacher: np.ndarray
    """float32, shape (num_answers,): a teacher's log-odds; shape (0,) where there is no teacher."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.size)

    @property
    def num_answers(self) -> int:
        return int(self.labels.size)

    @property
    def num_separate_tokens(self) -> int:
        """Tokens of the same prompts as separate sequences: what sharing saves."""
        pairs = zip(self.prefix_lengths, self.suffix_lengths, strict=True)
        return sum(prefix * len(lengths) + sum(lengths) for prefix, lengths in pairs)

    @property
    def suffix_start(self) -> int:
        """Where the suffixes begin."""
        return self.head_length + sum(length - self.head_length for length in self.prefix_lengths)

    def prefixes(self) -> list[np.ndarray]:
        """Token ids of each user's whole prefix."""
        head, end, found = self.token_ids[: self.head_length], self.head_length, []
        for length in self.prefix_lengths:
            start, end = end, end + length - self.head_length
            found.append(np.concatenate([head, self.token_ids[start:end]]))
        return found


def pack_row(tokenized: Sequence[TokenizedUser], teacher: Sequence[np.ndarray] = ()) -> PackedRow:
    """Lay users out as one row; each with its prefix and the suffixes it holds.

    Args:
        tokenized: the users.
        teacher: float32, of each user a teacher's log-odds of the suffixes; empty: there is no teacher.
    """
    prefixes = [np.asarray(user.prefix) for user in tokenized]
    suffixes = [(user, np.asarray(suffix)) for user in tokenized for suffix in user.suffixes]
    head = head_length([user.prefix for user in tokenized])
    positions = [np.arange(head), *(np.arange(head, len(prefix)) for prefix in prefixes)]
    positions += [len(user.prefix) + np.arange(len(suffix)) for user, suffix in suffixes]
    start = head + sum(len(prefix) - head for prefix in prefixes)
    ends = start + np.cumsum([len(suffix) for _, suffix in suffixes], dtype=np.int64)
    shared = [prefixes[0][:head]] if prefixes else []
    return PackedRow(
        token_ids=_concatenate([*shared, *(prefix[head:] for prefix in prefixes), *(suffix for _, suffix in suffixes)]),
        position_ids=_concatenate(positions),
        answer_index=ends - 1,
        labels=np.asarray([label for user in tokenized for label in user.labels], dtype=np.int64),
        group=np.repeat(np.arange(len(tokenized)), [len(user.suffixes) for user in tokenized]),
        head_length=head,
        prefix_lengths=tuple(len(user.prefix) for user in tokenized),
        suffix_lengths=tuple(tuple(map(len, user.suffixes)) for user in tokenized),
        users=tuple(user.user for user in tokenized),
        items=tuple(item for user in tokenized for item in user.items),
        teacher=np.concatenate([np.zeros(0, np.float32), *teacher]),
    )


def filler_row(answer_ids: tuple[int, int]) -> PackedRow:
    """The shortest row: one prompt of two tokens, which a rank runs to keep step with others."""
    user = TokenizedUser("", (answer_ids[0],), ((answer_ids[1],),), (0,), ("",))
    return pack_row([user], [np.zeros(1, np.float32)])


def head_length(prefixes: Sequence[Sequence[int]]) -> int:
    """How many tokens all prefixes of a row begin with, at least one of each left over; 0 for a single one."""
    return common_prefix_length(prefixes) if len(prefixes) > 1 else 0


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common token prefix that leaves at least one token of every sequence."""
    first, last = min(sequences), max(sequences)
    limit = min(map(len, sequences)) - 1
    return next((place for place in range(limit) if first[place] != last[place]), limit)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, dtype=np.int64)
