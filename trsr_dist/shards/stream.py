"""The training stream: the same global steps on any number of ranks and workers, resumable anywhere in constant time.

    order (seed, epoch) -> windows -> rows (packing by measured lengths) -> steps -> ranks (by cost) -> read, tokenize

All but the last arrow is arithmetic that every rank repeats for itself, so no rank waits for another and each makes
equally many steps with equally many rows. Worker processes hold no state: they are handed what to read.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

import numpy as np
from torch.utils.data import DataLoader

from trsr_dist.errors import DataError, RunError
from trsr_dist.log import get_logger
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow, pack_row
from trsr_dist.shards.measure import ALONE, Share, measure_lengths, prepare_worker
from trsr_dist.shards.plan import PackingSettings, TrainPlan, epoch_facts, step_specs
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.steps import Step, StepSpec, StreamState, Unit
from trsr_dist.shards.tables import CandidateTable

ADVISED_STEPS = 4
"""Steps whose samples the kernel is asked to read before they are handed out."""

log = get_logger("stream")


class TrainStream:
    """Iterates for ever over the steps of one rank.

    Args:
        shards: train split.
        builder: writes the prompts.
        settings: packing, draw of negatives, seed.
        share: of this process; its workers read, none: it reads itself.
        max_data_errors: damaged samples are left out, at most this many (``check_errors``). None: the first one stops
            the run.
        state: go on after this step; None: from the start.
        teacher: scores of the split's candidates, which the rows carry along.
        pool: whether each candidate may be drawn as a negative; None: all may.

    Raises:
        CheckpointError: the state belongs to other data or settings.
        ConfigError: a prompt is longer than a row, or shows more recent items than the shards have.
        DataError: the split is empty or damaged.
    """

    def __init__(
        self,
        shards: ShardSet,
        builder: PromptBuilder,
        settings: PackingSettings,
        share: Share = ALONE,
        max_data_errors: int | None = None,
        state: StreamState | None = None,
        teacher: CandidateTable | None = None,
        pool: CandidateTable | None = None,
    ) -> None:
        shards.check_recent_items(builder.recent_items)
        lengths = measure_lengths(shards, builder, share, tolerate=max_data_errors is not None)
        self.plan = TrainPlan(lengths, settings, pool)
        self.teacher = teacher
        rules = self.plan.identity
        start = StreamState(0, 0, 0, 0, shards.manifest_hash, builder.fingerprint, rules, **asdict(settings))
        if state is not None:
            state.check(start)
        self._state = state or start
        self._reader = StepReader(shards, builder, None if teacher is None else teacher.values)
        self._share = share
        self._max_data_errors = max_data_errors
        if lengths.facts.num_damaged:
            error = f"{lengths.folder}: {lengths.facts.damaged} hold damaged samples"
            self._leave_out(error)
            self.check_errors(lengths.facts.num_damaged, error)

    def steps_in_epoch(self, epoch: int) -> int:
        """Exact number of steps. Every rank calls it: rank 0 counts, once, see ``epoch_facts``."""
        return epoch_facts(self.plan, epoch, self._share.rank).num_steps

    def __iter__(self) -> Iterator[Step]:
        specs = step_specs(self.plan, self._state, self._share.rank, self._share.world_size)
        advised = advise_ahead(specs, self._reader.shards)
        with load_steps(self._reader, advised, self._share.num_workers) as steps:
            for step in steps:
                for error in step.errors:
                    self._leave_out(error)
                self._state = step.state
                yield step

    def check_errors(self, count: int, error: str) -> None:
        """Stop a run that lacks too much.

        Args:
            count: of damaged samples, on all ranks and in all starts.
            error: of one of them.

        Raises:
            DataError: there are more than allowed.
        """
        if count > self._max_data_errors:
            raise DataError(f"{error}; that makes {count}, train.max_data_errors allows {self._max_data_errors}")

    def _leave_out(self, error: str) -> None:
        if self._max_data_errors is None:
            raise DataError(error)
        log.warning("left out: %s", error)


def advise_ahead(specs: Iterator[StepSpec], shards: ShardSet) -> Iterator[StepSpec]:
    """The specs, each handed out only when the kernel has been asked to read later ones."""
    waiting: deque[StepSpec] = deque()
    for spec in specs:
        for unit in (unit for row in spec.rows for unit in row):
            with suppress(DataError):  # the reader will say what is wrong
                shards.advise(unit.sample, unit.sample + 1)
        waiting.append(spec)
        if len(waiting) > ADVISED_STEPS:
            yield waiting.popleft()
    yield from waiting


@dataclass(frozen=True, slots=True)
class StepReader:
    """Reads, tokenizes and lays out; a map-style data set whose keys are the specs themselves."""

    shards: ShardSet
    builder: PromptBuilder
    teacher: np.ndarray | None = None
    """float32, shape (num_samples, most candidates): a teacher's log-odds."""

    def __getitem__(self, spec: StepSpec) -> Step:
        rows = [self.read_row(units) for units in spec.rows]
        return Step(
            rows=[row for row, _ in rows],
            numbers=spec.numbers,
            num_answers=spec.num_answers,
            num_users=spec.num_users,
            epoch=spec.epoch,
            state=spec.state,
            errors=tuple(error for _, errors in rows for error in errors),
        )

    def read_row(self, units: Sequence[Unit]) -> tuple[PackedRow, list[str]]:
        """The row, and what was wrong with the units that it lacks; a row without units is empty."""
        tokenized, teacher, errors = [], [], []
        for unit in units:
            try:
                tokenized.append(self.tokenize(unit))
            except DataError as error:
                errors.append(str(error))
                continue
            if self.teacher is not None:
                teacher.append(self.teacher[unit.sample, list(unit.candidates)])
        return pack_row(tokenized, teacher), errors

    def tokenize(self, unit: Unit) -> TokenizedUser:
        """The user with the unit's candidates, exactly as planned.

        Only these candidates are decoded and tokenized, unless the user's trimming depends on the others too.

        Raises:
            DataError: the sample is damaged, or its lengths are not the measured ones.
        """
        if unit.trimmed:
            user = self.builder.build(self.shards.read(unit.sample)).choose(unit.candidates)
        else:
            user = self.builder.build(self.shards.read(unit.sample, unit.candidates))
            rest = user.prefix[unit.prefix :]  # what is beyond moves to each suffix
            suffixes = tuple(rest + suffix for suffix in user.suffixes)
            user = replace(user, prefix=user.prefix[: unit.prefix], suffixes=suffixes)
        if len(user.prefix) != unit.prefix or tuple(map(len, user.suffixes)) != unit.suffixes:
            raise DataError(
                f"{self.shards.folder}: sample {unit.sample} has other token lengths than were measured; remove the "
                "folder's lengths-* and start again"
            )
        return user


@contextmanager
def load_steps(reader: StepReader, specs: Iterator[StepSpec], num_workers: int) -> Iterator[Iterator[Step]]:
    """The steps of ``specs``, read ahead by ``num_workers`` processes; 0: read here, when asked for."""
    if not num_workers:
        yield map(reader.__getitem__, specs)
        return
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=specs,
        num_workers=num_workers,
        collate_fn=lambda step: step,
        worker_init_fn=lambda worker: prepare_worker(),
        multiprocessing_context="fork",
    )
    steps = iter(loader)
    # Without this, multiprocessing would wait at exit for workers that ignore its SIGTERM.
    close = steps._shutdown_workers
    atexit.register(close)
    try:
        yield _in_own_words(steps)
    finally:
        close()
        atexit.unregister(close)


def _in_own_words(steps: Iterator[Step]) -> Iterator[Step]:
    """A worker's error for the user comes with its traceback as text; the message alone is passed on."""
    try:
        yield from steps
    except RunError as error:
        raise RunError(str(error).rpartition(f"{RunError.__name__}: ")[2].strip()) from None
