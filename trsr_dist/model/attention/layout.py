"""Who reads whom in a packed row, as a few variable-length attention calls over slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain, islice, pairwise

import torch

from trsr_dist.rows import PackedRow


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on ``device``. From pageable memory the copy would wait for all that the GPU has yet to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class Call:
    """One variable-length attention call: the i-th segment of the queries reads the i-th segment of the keys."""

    queries: slice
    """Of the query tensor."""
    keys: slice
    """Of the key and value tensors."""
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    causal: bool
    """A query reads no key behind its own place; segments of unequal lengths are aligned at their ends."""
    device: torch.device

    @cached_property
    def query_starts(self) -> torch.Tensor:
        """int32, shape (num_segments + 1,): cumulative query lengths, as flash kernels want them."""
        return self._starts(self.query_lengths)

    @cached_property
    def key_starts(self) -> torch.Tensor:
        """int32, shape (num_segments + 1,)."""
        return self._starts(self.key_lengths)

    @cached_property
    def longest_query(self) -> int:
        return max(self.query_lengths)

    @cached_property
    def longest_key(self) -> int:
        return max(self.key_lengths)

    def _starts(self, lengths: Sequence[int]) -> torch.Tensor:
        return send(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), self.device)


@dataclass(frozen=True)
class Layout:
    """A packed row for the attention.

    ``[H | P_1 ... P_U | C_11 ... C_1n | C_21 ... ]`` as in ``PackedRow``; every token reads the parts above its own
    and its own part up to itself.
    """

    head: int
    prefixes: tuple[int, ...]
    """Tokens of each P_u, without the head."""
    suffixes: tuple[tuple[int, ...], ...]
    device: torch.device
    num_kept: int = 0
    """Tokens at the beginning whose keys and values come from an earlier pass: 0, or all before the suffixes. They are
    no queries, and places of queries are counted from the first suffix."""

    @classmethod
    def of(cls, row: PackedRow, device: torch.device, suffixes_only: bool = False) -> Layout:
        """The layout of a row with at least one user; with ``suffixes_only`` whole prefixes are kept, no head."""
        if suffixes_only:
            return cls(0, row.prefix_lengths, row.suffix_lengths, device, sum(row.prefix_lengths))
        prefixes = tuple(length - row.head_length for length in row.prefix_lengths)
        return cls(row.head_length, prefixes, row.suffix_lengths, device)

    @cached_property
    def code(self) -> torch.Tensor:
        """int64, on the CPU, shape (3 + 2 * num_users + num_answers,): the lengths, for an operator that takes no
        Python objects; ``decoded`` is the inverse."""
        counts = map(len, self.suffixes)
        numbers = (self.num_kept, self.head, len(self.prefixes), *self.prefixes, *counts, *self._suffix_lengths)
        return torch.tensor(numbers, dtype=torch.int64)

    @cached_property
    def num_tokens(self) -> int:
        return self.suffix_start + sum(self.suffix_totals)

    @cached_property
    def suffix_start(self) -> int:
        return self.head + sum(self.prefixes)

    @cached_property
    def suffix_totals(self) -> tuple[int, ...]:
        """Suffix tokens of each user."""
        return tuple(map(sum, self.suffixes))

    @cached_property
    def num_answers(self) -> int:
        return sum(map(len, self.suffixes))

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """Attention of all queries; the first call covers them."""
        head, start, end, kept = self.head, self.suffix_start, self.num_tokens, self.num_kept
        above = () if kept else (*((head,) if head else ()), *self.prefixes)
        segments, suffixes = (*above, *self._suffix_lengths), slice(start - kept, end - kept)
        calls = [Call(slice(0, end - kept), slice(kept, end), segments, segments, True, self.device)]
        if head:
            calls.append(Call(slice(head, end), slice(0, head), (end - head,), (head,), False, self.device))
        calls.append(Call(suffixes, slice(head, start), self.suffix_totals, self.prefixes, False, self.device))
        return tuple(calls)

    @cached_property
    def copied_calls(self) -> tuple[Call, ...]:
        """The same attention over keys with a copy of the head before each prefix (``copies``), in fewer calls."""
        head, start, end = self.head, self.suffix_start, self.num_tokens
        read = tuple(head + length for length in self.prefixes)
        queries, keys = (head, *self.prefixes, *self._suffix_lengths), (head, *read, *self._suffix_lengths)
        own = Call(slice(0, end), slice(0, sum(keys)), queries, keys, True, self.device)
        above = Call(slice(start, end), slice(head, head + sum(read)), self.suffix_totals, read, False, self.device)
        return own, above

    @cached_property
    def copies(self) -> torch.Tensor:
        """int64: the token at each place of ``[H | H P_1 | ... H P_U | C_11 ...]``."""
        return send(self._copies, self.device)

    @cached_property
    def copied_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64: where each token stands in ``copies`` (of the head the first time), and the head's places before each
        prefix, user by user."""
        own = torch.empty(self.num_tokens, dtype=torch.int64)
        own[self._copies] = torch.arange(len(self._copies))
        own[: self.head] = torch.arange(self.head)
        heads = (self._copies < self.head).nonzero().flatten()[self.head :]
        return send(own, self.device), send(heads, self.device)

    @cached_property
    def _copies(self) -> torch.Tensor:
        """Not on the device, where asking for the head's places would wait for it."""
        head, ends = [*range(self.head)], [*accumulate(self.prefixes, initial=self.head)]
        prefixes = [[*head, *range(start, end)] for start, end in pairwise(ends)]
        return torch.tensor([*head, *chain.from_iterable(prefixes), *range(ends[-1], self.num_tokens)])

    @cached_property
    def answer_calls(self) -> tuple[Call, ...]:
        """Attention of the answer positions alone, one query a suffix; the first call covers all queries."""
        head, start, end, answers = self.head, self.suffix_start, self.num_tokens, slice(0, self.num_answers)
        lengths = self._suffix_lengths
        calls = [Call(answers, slice(start, end), (1,) * len(lengths), lengths, False, self.device)]
        if head:
            calls.append(Call(answers, slice(0, head), (self.num_answers,), (head,), False, self.device))
        counts = tuple(map(len, self.suffixes))
        calls.append(Call(answers, slice(head, start), counts, self.prefixes, False, self.device))
        return tuple(calls)

    @cached_property
    def answer_index(self) -> torch.Tensor:
        """int64, shape (num_answers,): the last token of each suffix, among the queries."""
        ends = [end - 1 for end in accumulate(self._suffix_lengths, initial=self.suffix_start - self.num_kept)]
        return send(torch.tensor(ends[1:], dtype=torch.int64), self.device)

    @cached_property
    def segments(self) -> torch.Tensor:
        """int64, shape (2, num_tokens): each token's segment, and the segment above it.

        Segment 0 is the head (empty or not), 1 to U are the prefixes, then the suffixes follow.
        """
        num_users = len(self.prefixes)
        owners = [user + 1 for user, lengths in enumerate(self.suffixes) for _ in lengths]
        lengths = torch.tensor([self.head, *self.prefixes, *self._suffix_lengths])
        own = torch.arange(len(lengths))
        above = torch.tensor([0, *[0] * num_users, *owners])
        return send(torch.stack((own, above)).repeat_interleave(lengths, dim=1), self.device)

    @cached_property
    def mask(self) -> torch.Tensor:
        """bool, shape (num_queries, num_tokens): True where the row's token may read the column's. Quadratic."""
        own, above = self.segments
        places = torch.arange(self.num_tokens, device=self.device)
        related = (own[None] == own[:, None]) | (own[None] == above[:, None]) | (own[None] == 0)
        return (related & (places[None] <= places[:, None]))[self.num_kept :]

    @property
    def _suffix_lengths(self) -> tuple[int, ...]:
        return tuple(length for lengths in self.suffixes for length in lengths)


def decoded(code: torch.Tensor, device: torch.device) -> Layout:
    """The layout that has this ``Layout.code``. All layers of a row get the same object."""
    return _decoded(tuple(code.tolist()), device)


@lru_cache(maxsize=16)
def _decoded(numbers: tuple[int, ...], device: torch.device) -> Layout:
    num_kept, head, num_users, *lengths = numbers
    prefixes, counts = lengths[:num_users], lengths[num_users : 2 * num_users]
    suffixes = iter(lengths[2 * num_users :])
    parts = tuple(tuple(islice(suffixes, count)) for count in counts)
    return Layout(head, tuple(prefixes), parts, device, num_kept)
