"""Tokens, pairs and rows of a split under a run's settings, from measured lengths or from a sample of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trsr_dist.planning.tokens import Workload
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import head_length
from trsr_dist.shards.lengths import SUMMARY, Lengths, Table, lengths_folder
from trsr_dist.shards.packing import attended_pairs, choose_candidates
from trsr_dist.shards.reader import ShardSet

LOOKED_AT = 8192
"""Samples whose measured lengths stand for all."""
TOKENIZED = 200
"""Samples that are tokenized where no lengths were measured."""
FILL = 0.98
"""Share of a row that packing fills."""


@dataclass(frozen=True, slots=True)
class SplitWork:
    """One pass over a split."""

    num_users: int
    shared: Workload
    """In rows, shared parts once."""
    separate: Workload
    """The same prompts as sequences of their own."""
    num_rows: int
    is_measured: bool
    """From measured lengths; else from a sample of prompts."""


def split_work(folder: Path, builder: PromptBuilder, row_tokens: int, negatives: int | None, seed: int) -> SplitWork:
    """The work of a pass over a split.

    Args:
        folder: ``RUN/shards/{split}``.
        builder: writes the prompts.
        row_tokens: of a row.
        negatives: drawn per positive; None: all candidates.
        seed: of the draw.

    Raises:
        RunError: the split is not there.
        DataError: a sample is damaged.
    """
    shards = ShardSet(folder)
    measured = lengths_folder(shards, builder)
    if (measured / SUMMARY).is_file():
        lengths = Lengths(shards, measured)
        table, head = lengths.table([(0, min(len(shards), LOOKED_AT))]), lengths.facts.head_tokens
    else:
        users = [builder.build(shards.read(index)) for index in range(min(len(shards), TOKENIZED))]
        table, head = table_of(users), head_length([np.asarray(user.prefix) for user in users])
    keys = shards.keys(0, len(table.samples))
    chosen = np.ones(len(table.suffixes), dtype=bool)
    if negatives is not None:
        chosen = choose_candidates(keys, table.starts, table.labels, negatives, seed)
    return scale_work(table, chosen, head, row_tokens, len(shards), (measured / SUMMARY).is_file())


def table_of(users: Sequence[TokenizedUser]) -> Table:
    """Lengths of tokenized users, as they would be measured."""
    counts = [len(user.suffixes) for user in users]
    return Table(
        samples=np.arange(len(users)),
        prefixes=np.array([len(user.prefix) for user in users]),
        trimmed=np.zeros(len(users), dtype=bool),
        starts=np.concatenate([[0], np.cumsum(counts)]),
        suffixes=np.array([len(suffix) for user in users for suffix in user.suffixes]),
        labels=np.array([label > 0 for user in users for label in user.labels]),
    )


def scale_work(
    table: Table, chosen: np.ndarray, head: int, row_tokens: int, num_users: int, is_measured: bool
) -> SplitWork:
    """From the users of a table to a split of ``num_users``."""
    owner, suffixes = table.owner[chosen], table.suffixes[chosen]
    size = len(table.samples)
    sums, squares, counts = (
        np.bincount(owner, weights=weights, minlength=size) for weights in (suffixes, suffixes**2, None)
    )
    units = table.prefixes + sums - head
    rows = max(1.0, units.sum() / (FILL * (row_tokens - head)))
    lengths = table.prefixes[owner] + suffixes
    separate = Workload(int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum()), int(counts.sum()), size)
    pairs = attended_pairs(table.prefixes, sums, squares).sum()
    shared = Workload(round(units.sum() + rows * head), round(pairs), int(counts.sum()), size)
    factor = num_users / size
    return SplitWork(
        num_users, shared.scaled(factor), separate.scaled(factor), max(1, round(rows * factor)), is_measured
    )
