"""Rows of a split with every candidate of every user, the same on any number of ranks."""

from __future__ import annotations

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.rows import PackedRow
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.packing import deal
from trsr_dist.shards.plan import WINDOW_SAMPLES, Unit, WindowPlan, check_fits
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.rows import RowReader


class EvaluationPlan:
    """Packs a split's users, window by window in the shards' order.

    Args:
        shards: of the split.
        builder: writes the prompts.
        row_tokens: token limit of a row.
        max_users: only the first so many; 0: all.
        rank: this process, for the measuring of lengths.
        world_size: number of processes.
        num_workers: processes that measure lengths; 0: this one.

    Raises:
        ConfigError: a prompt is longer than a row.
        DataError: a sample is damaged.
    """

    def __init__(
        self,
        shards: ShardSet,
        builder: PromptBuilder,
        row_tokens: int,
        max_users: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        lengths = measure_lengths(shards, builder, rank, world_size, num_workers)
        check_fits(lengths, row_tokens, "evaluate.row_tokens")
        self._reader = RowReader(shards, builder)
        self.num_users = min(max_users or len(shards), len(shards))
        self.rows: list[tuple[Unit, ...]] = []
        self.costs: list[float] = []
        for start in range(0, self.num_users, WINDOW_SAMPLES):
            table = lengths.table([(start, min(start + WINDOW_SAMPLES, self.num_users))])
            plan = WindowPlan(table, np.ones(len(table.suffixes), dtype=bool), row_tokens, key=0)
            self.rows += [plan.units(row) for row in range(plan.num_rows)]
            self.costs += [plan.cost(row) for row in range(plan.num_rows)]

    def assign(self, rank: int, world_size: int) -> list[int]:
        """A rank's rows, balanced by cost; ``num_forwards`` of them, or one less."""
        return deal(self.costs, world_size)[rank]

    def num_forwards(self, world_size: int) -> int:
        """Forward passes that every rank must make where passes meet in collectives (ZeRO-3)."""
        return -(-len(self.rows) // world_size)

    def read_row(self, row: int) -> PackedRow:
        """Read and tokenize a row.

        Raises:
            DataError: a sample is damaged.
        """
        packed, errors = self._reader.read_row(self.rows[row])
        if errors:
            raise DataError(errors[0])
        return packed
