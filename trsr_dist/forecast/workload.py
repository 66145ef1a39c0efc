"""Tokens, pairs and rows of a split under a run's settings: from measured lengths, or from a sample of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.hashing import hash64
from trsr_dist.planning.tokens import Workload
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.wording import recommend_instruction
from trsr_dist.records import Candidate, Sample, TokenizedUser
from trsr_dist.rows import head_length
from trsr_dist.shards.codec import member_key
from trsr_dist.shards.lengths import SUMMARY, Lengths, Table, lengths_folder
from trsr_dist.shards.packing import attended_pairs, choose_candidates
from trsr_dist.shards.reader import ShardSet

LOOKED_AT = 8192
"""Samples whose measured lengths stand for all."""
TOKENIZED = 200
"""Samples that are tokenized where no lengths were measured."""
FILL = 0.98
"""Share of a row that packing fills."""

Source = Literal["measured", "sampled", "histories"]


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Lengths of some users' prompts, who stand for a split."""

    table: Table
    keys: np.ndarray
    """uint64, shape (num_samples,): a hash of each user."""
    head: int
    """Tokens that all prompts begin with."""
    num_users: int
    """Of the whole split."""
    source: Source


@dataclass(frozen=True, slots=True)
class SplitWork:
    """One pass over a split."""

    num_users: int
    shared: Workload
    """In rows, shared parts once."""
    separate: Workload
    """The same prompts as sequences of their own."""
    num_rows: int
    source: Source
    """``measured`` lengths of the shards, a sample of the shards' prompts, or of prompts made from ``histories``."""


def shard_lengths(folder: Path, builder: PromptBuilder) -> PromptLengths:
    """Lengths of a split's shards.

    Args:
        folder: ``RUN/shards/{split}``.
        builder: writes the prompts.

    Raises:
        RunError: the split is not there.
        DataError: a sample is damaged.
    """
    shards = ShardSet(folder)
    measured = lengths_folder(shards, builder)
    if (measured / SUMMARY).is_file():
        lengths = Lengths(shards, measured)
        table = lengths.table([(0, min(len(shards), LOOKED_AT))])
        keys = shards.keys(0, len(table.samples))
        return PromptLengths(table, keys, lengths.facts.head_tokens, len(shards), "measured")
    size = min(len(shards), TOKENIZED)
    users = [builder.build(shards.read(index)) for index in range(size)]
    return _tokenized(users, shards.keys(0, size), len(shards), "sampled")


def history_lengths(
    store: HistoryStore,
    split: str,
    builder: PromptBuilder,
    domain: str,
    summary_of: Callable[[Sequence[str]], str],
    num_recent: int,
) -> PromptLengths:
    """Lengths of the prompts that a split's users will have once their summaries are written.

    Args:
        store: histories.
        split: which.
        builder: writes the prompts.
        domain: wording of the prompts.
        summary_of: from the texts of a history, oldest first, to a text as long as its summary.
        num_recent: items that a sample shows in full.
    """
    size = min(store.num_users(split), TOKENIZED)
    rows = [store.user(split, index) for index in range(size)]
    users = [builder.build(expected_sample(store, row, domain, summary_of, num_recent)) for row in rows]
    keys = np.array([hash64(member_key(row.user)) for row in rows], dtype=np.uint64)
    return _tokenized(users, keys, store.num_users(split), "histories")


def filler(history: Sequence[str], num_bytes: int) -> str:
    """The beginning of a history, again and again, in place of a summary of so many bytes."""
    text = " ".join(history)
    copies = -(-num_bytes // max(1, len(text.encode())))
    return " ".join([text] * copies).encode()[:num_bytes].decode(errors="ignore")


def expected_sample(
    store: HistoryStore, row: UserRow, domain: str, summary_of: Callable[[Sequence[str]], str], num_recent: int
) -> Sample:
    """A user's sample, as far as it is known before the summary is written; arguments as of ``history_lengths``."""
    catalogue = store.catalogue
    history = [catalogue.text(item) for item in row.history]
    chosen = [catalogue.item(item) for item in row.candidates]
    candidates = tuple(Candidate(item.id, item.text, label) for item, label in zip(chosen, row.labels, strict=True))
    recent = tuple(history[-num_recent:]) if num_recent else ()
    return Sample(row.user, recommend_instruction(domain), summary_of(history), recent, candidates)


def _tokenized(users: Sequence[TokenizedUser], keys: np.ndarray, num_users: int, source: Source) -> PromptLengths:
    head = head_length([user.prefix for user in users])
    return PromptLengths(table_of(users), keys, head, num_users, source)


def table_of(users: Sequence[TokenizedUser]) -> Table:
    """Lengths of tokenized users, as they would be measured."""
    counts = [len(user.suffixes) for user in users]
    return Table(
        samples=np.arange(len(users)),
        prefixes=_integers(len(user.prefix) for user in users),
        trimmed=np.zeros(len(users), dtype=bool),
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        suffixes=_integers(len(suffix) for user in users for suffix in user.suffixes),
        labels=np.array([label > 0 for user in users for label in user.labels], dtype=bool),
    )


def split_work(lengths: PromptLengths, row_tokens: int, negatives: int | None, seed: int) -> SplitWork:
    """The work of a pass over a split.

    Args:
        lengths: of some of its users' prompts.
        row_tokens: of a row.
        negatives: drawn per positive; None: all candidates.
        seed: of the draw.
    """
    table, size = lengths.table, len(lengths.table.samples)
    chosen = np.ones(len(table.suffixes), dtype=bool)
    if negatives is not None:
        chosen = choose_candidates(lengths.keys, table.starts, table.labels, negatives, seed)
    owner, suffixes = table.owner[chosen], table.suffixes[chosen]
    sums, squares, counts = (
        np.bincount(owner, weights=weights, minlength=size) for weights in (suffixes, suffixes**2, None)
    )
    units = table.prefixes + sums - lengths.head
    rows = max(1.0, units.sum() / (FILL * max(1, row_tokens - lengths.head)))
    whole = table.prefixes[owner] + suffixes
    separate = Workload(int(whole.sum()), int((whole * (whole + 1) // 2).sum()), int(counts.sum()), size)
    pairs = attended_pairs(table.prefixes, sums, squares).sum()
    shared = Workload(round(units.sum() + rows * lengths.head), round(pairs), int(counts.sum()), size)
    factor = lengths.num_users / max(1, size)
    return SplitWork(
        lengths.num_users,
        shared.scaled(factor),
        separate.scaled(factor),
        max(1, round(rows * factor)),
        lengths.source,
    )


def _integers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)
