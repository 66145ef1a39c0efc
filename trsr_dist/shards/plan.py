"""The plan of a split: which candidates of which users share a row, in which order, and which rank gets which rows.

Arithmetic on measured lengths: no sample is read for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np

from trsr_dist.errors import ConfigError, DataError
from trsr_dist.files import read_json, write_json
from trsr_dist.hashing import digest, hash64
from trsr_dist.shards.lengths import Lengths, Table, wait_for
from trsr_dist.shards.order import BLOCK_SAMPLES, Order, mix
from trsr_dist.shards.packing import attended_pairs, choose_candidates, deal, pack, row_cost, split_unit
from trsr_dist.shards.steps import StepSpec, StreamState, Unit
from trsr_dist.shards.tables import CandidateTable

PLAN_VERSION = 1
"""Raised whenever the same lengths and settings would give other rows: a checkpoint then belongs to other steps."""
WINDOW_SAMPLES = 8192
"""Neighbouring samples of the order that are packed together, at least."""
WINDOW_ROWS = 64
"""Rows of a window, at least about, so that the last one, filled by half on average, costs little."""


@dataclass(frozen=True, slots=True)
class PackingSettings:
    """What the rows of an epoch depend on, beside the shards and the prompts."""

    row_tokens: int
    """Token limit of a row."""
    rows_per_step: int
    """Rows of an optimizer step over all ranks."""
    negatives_per_positive: int
    """Drawn from a user's pool in each epoch."""
    seed: int


class WindowPlan:
    """The rows of one window.

    Args:
        table: lengths of the window's samples.
        chosen: bool, shape (num_candidates,): the candidates that take part.
        row_tokens: token limit of a row.
        key: of the order of the rows and of units of equal length.
        head: tokens that all prefixes begin with; a row holds them once.
    """

    def __init__(self, table: Table, chosen: np.ndarray, row_tokens: int, key: int, head: int = 0) -> None:
        self._table = table
        self._head = head
        self._kept = np.flatnonzero(chosen)
        self._sample, self._first, self._last = self._cut_units(row_tokens)
        suffixes = table.suffixes[self._kept]
        sums, squares = _running_sum(suffixes), _running_sum(suffixes**2)
        suffix_sum = sums[self._last] - sums[self._first]
        suffix_squares = squares[self._last] - squares[self._first]
        self._tokens = table.prefixes[self._sample] + suffix_sum - head
        self._pairs = attended_pairs(table.prefixes[self._sample], suffix_sum, suffix_squares)
        ties = mix(table.samples[self._sample].astype(np.uint64) ^ np.uint64(key))
        rows = pack(self._tokens, row_tokens - head, ties)
        order = np.argsort(mix(np.arange(len(rows), dtype=np.uint64) ^ np.uint64(key)), kind="stable")
        self._rows = [rows[number] for number in order.tolist()]

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def num_tokens(self) -> int:
        return int(self._tokens.sum()) + self._head * self.num_rows

    @property
    def num_chunks(self) -> int:
        """Units beyond the first of users whose candidates do not fit one row."""
        return len(self._sample) - len(np.unique(self._sample))

    def cost(self, row: int) -> float:
        """Cost of a row, in tokens."""
        units = self._rows[row]
        return float(row_cost(self._head + self._tokens[units].sum(), self._pairs[units].sum()))

    def num_answers(self, row: int) -> int:
        units = self._rows[row]
        return int((self._last[units] - self._first[units]).sum())

    def num_users(self, row: int) -> int:
        """Users of a row; one that is cut in chunks counts in the row of the first."""
        units = self._rows[row]
        return int((self._first[units] == self._kept_starts[self._sample[units]]).sum())

    def units(self, row: int) -> tuple[Unit, ...]:
        """The units of a row."""
        return tuple(self._unit(unit) for unit in self._rows[row])

    def _cut_units(self, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample, first and last + 1 kept candidate of each unit; a user that fits a row is one unit."""
        table, num_samples = self._table, len(self._table.samples)
        owner = table.owner[self._kept]
        counts = np.bincount(owner, minlength=num_samples)
        self._kept_starts = np.cumsum(counts) - counts
        suffixes = table.suffixes[self._kept]
        tokens = table.prefixes + np.bincount(owner, weights=suffixes, minlength=num_samples).astype(np.int64)
        whole = np.flatnonzero((counts > 0) & (tokens <= row_tokens))
        parts = [(whole, self._kept_starts[whole], self._kept_starts[whole] + counts[whole])]
        for sample in np.flatnonzero((counts > 0) & (tokens > row_tokens)).tolist():
            start = self._kept_starts[sample]
            lengths = suffixes[start : start + counts[sample]].tolist()
            chunks = np.array(split_unit(int(table.prefixes[sample]), lengths, row_tokens))
            parts.append((np.full(len(chunks), sample), start + chunks[:, 0], start + chunks[:, 1]))
        sample, first, last = (np.concatenate(column) for column in zip(*parts, strict=True))
        return sample, first, last

    def _unit(self, unit: int) -> Unit:
        table, sample = self._table, self._sample[unit]
        kept = self._kept[self._first[unit] : self._last[unit]]
        return Unit(
            sample=int(table.samples[sample]),
            prefix=int(table.prefixes[sample]),
            trimmed=bool(table.trimmed[sample]),
            candidates=tuple((kept - table.starts[sample]).tolist()),
            suffixes=tuple(table.suffixes[kept].tolist()),
        )


@dataclass(frozen=True, slots=True)
class EpochFacts:
    """Counts of one epoch."""

    num_steps: int
    num_rows: int
    num_tokens: int
    num_chunks: int
    """Units beyond the first of users whose candidates do not fit one row."""
    fill: float
    """Tokens per place in the rows."""


class TrainPlan:
    """The rows of every epoch, equal on all ranks.

    Args:
        lengths: of the train split.
        settings: of the packing.
        pool: whether each candidate may be drawn as a negative; None: all may.

    Attributes:
        head: tokens that every row holds once.
        order: of the samples.
        window: (epoch, window) to its rows; the last two are kept.
        facts: epoch to its counts; plans the whole epoch.

    Raises:
        ConfigError: a single prompt is longer than a row.
        DataError: there is nothing to train on.
    """

    def __init__(self, lengths: Lengths, settings: PackingSettings, pool: CandidateTable | None = None) -> None:
        check_fits(lengths, settings.row_tokens, "train.row_tokens")
        self.lengths = lengths
        self.settings = settings
        self.pool = pool
        self.head = lengths.facts.head_tokens
        self.order = Order(len(lengths.shards), self._window_blocks(), settings.seed)
        self.window = lru_cache(maxsize=2)(self._window)
        self.facts = lru_cache(maxsize=64)(self._facts)

    @property
    def identity(self) -> str:
        """Hash of what the rows depend on beside the settings."""
        pool = [] if self.pool is None else [self.pool.sha256]
        return digest([PLAN_VERSION, asdict(self.lengths.facts), *pool])[:16]

    def windows(self, epoch: int) -> Iterator[WindowPlan]:
        for window in range(self.order.num_windows):
            yield self.window(epoch, window)

    def _window(self, epoch: int, window: int) -> WindowPlan:
        settings = self.settings
        runs = self.order.runs(epoch, window)
        table = self.lengths.table(runs)
        keys = np.concatenate([self.lengths.shards.keys(start, stop) for start, stop in runs])
        draw = hash64(settings.seed, epoch, "negatives")
        negatives, allowed = settings.negatives_per_positive, None
        if self.pool is not None:
            numbers = np.arange(len(table.labels)) - table.starts[table.owner]
            allowed = self.pool.values[table.samples[table.owner], numbers]
        chosen = choose_candidates(keys, table.starts, table.labels, negatives, draw, allowed)
        key = hash64(settings.seed, epoch, window, "rows")
        return WindowPlan(table, chosen, settings.row_tokens, key, self.head)

    def _facts(self, epoch: int) -> EpochFacts:
        num_rows = num_tokens = num_chunks = 0
        for plan in self.windows(epoch):
            num_rows += plan.num_rows
            num_tokens += plan.num_tokens
            num_chunks += plan.num_chunks
        num_steps = -(-num_rows // self.settings.rows_per_step)
        fill = num_tokens / (num_rows * self.settings.row_tokens)
        return EpochFacts(num_steps, num_rows, num_tokens, num_chunks, fill)

    def _window_blocks(self) -> int:
        """Blocks of a window: a pure function of the split's lengths and the settings."""
        facts = self.lengths.facts
        per_user = facts.num_candidates / facts.num_samples
        chosen = min(per_user, 1 + self.settings.negatives_per_positive)
        unit_tokens = (facts.prefix_tokens + facts.suffix_tokens * chosen / per_user) / facts.num_samples - self.head
        samples = max(WINDOW_SAMPLES, round(WINDOW_ROWS * (self.settings.row_tokens - self.head) / unit_tokens))
        return -(-samples // BLOCK_SAMPLES)


def epoch_facts(plan: TrainPlan, epoch: int, rank: int = 0) -> EpochFacts:
    """Counts of an epoch; the first time rank 0 plans all its rows (seconds per million samples), and the others wait.

    Beside lengths that another user has measured nothing may be kept: then every rank counts for itself.

    Args:
        plan: of the rows.
        epoch: from 0.
        rank: this process.

    Raises:
        DataError: rank 0 has stopped counting.
    """
    key = digest([plan.identity, asdict(plan.settings), epoch])[:16]
    folder = plan.lengths.folder
    path = folder / f"epoch-{key}.json"
    may_keep = os.access(folder, os.W_OK)
    if rank and may_keep:
        wait_for(folder, path.is_file)
    if path.is_file():
        return read_json(path, EpochFacts)
    facts = plan.facts(epoch)
    if may_keep:
        write_json(path, asdict(facts))
    return facts


def step_specs(plan: TrainPlan, state: StreamState, rank: int, world_size: int) -> Iterator[StepSpec]:
    """The steps of one rank after ``state``, for ever."""
    while True:
        epoch = state.epoch
        picked, state = _next_rows(plan, state)
        if picked:
            yield _deal_rows(picked, epoch, state, rank, world_size)


def _next_rows(plan: TrainPlan, state: StreamState) -> tuple[list[tuple[WindowPlan, int]], StreamState]:
    """The rows of the next step (none where the epoch has no more) and the state after it."""
    epoch, window, row = state.epoch, state.window, state.row
    picked: list[tuple[WindowPlan, int]] = []
    while len(picked) < plan.settings.rows_per_step and window < plan.order.num_windows:
        current = plan.window(epoch, window)
        stop = min(current.num_rows, row + plan.settings.rows_per_step - len(picked))
        picked += [(current, number) for number in range(row, stop)]
        row = stop
        if row == current.num_rows:
            window, row = window + 1, 0
    if window == plan.order.num_windows:
        epoch, window, row = epoch + 1, 0, 0
    return picked, replace(state, epoch=epoch, window=window, row=row, step=state.step + bool(picked))


def _deal_rows(
    picked: list[tuple[WindowPlan, int]], epoch: int, state: StreamState, rank: int, world_size: int
) -> StepSpec:
    hand = deal([plan.cost(row) for plan, row in picked], world_size)[rank]
    rows = [picked[number][0].units(picked[number][1]) for number in hand]
    num_places = -(-state.rows_per_step // world_size)
    padding = [state.rows_per_step + rank + world_size * place for place in range(num_places - len(hand))]
    return StepSpec(
        rows=(*rows, *(() for _ in padding)),
        numbers=(*hand, *padding),
        num_answers=sum(plan.num_answers(row) for plan, row in picked),
        num_users=sum(plan.num_users(row) for plan, row in picked),
        epoch=epoch,
        state=state,
    )


def check_fits(lengths: Lengths, row_tokens: int, name: str) -> None:
    """Every single prompt must fit a row.

    Raises:
        ConfigError: one does not.
        DataError: the split has no candidates.
    """
    facts = lengths.facts
    if not facts.num_candidates:
        raise DataError(f"{lengths.shards.folder}: no candidates in {facts.num_samples} samples; make the split again")
    if facts.longest_prompt > row_tokens:
        raise ConfigError(
            f"{name}={row_tokens}: the longest prompt has {facts.longest_prompt} tokens; "
            f"set {name} to that or more, or lower prompt.max_tokens"
        )


def _running_sum(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(values)])
