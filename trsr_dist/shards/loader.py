"""Reads planned steps in order, in worker processes where asked for, and leaves no process behind."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.utils.data import DataLoader

from trsr_dist.environment import die_with_parent
from trsr_dist.shards.rows import RowReader
from trsr_dist.shards.steps import Step, StepSpec


@dataclass(frozen=True, slots=True)
class StepReader:
    """A map-style data set whose keys are the specs themselves."""

    rows: RowReader

    def __getitem__(self, spec: StepSpec) -> Step:
        rows = [self.rows.read_row(units) for units in spec.rows]
        return Step(
            rows=[row for row, _ in rows],
            numbers=spec.numbers,
            num_answers=spec.num_answers,
            num_users=spec.num_users,
            epoch=spec.epoch,
            state=spec.state,
            errors=tuple(error for _, errors in rows for error in errors),
        )


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
        collate_fn=_as_is,
        worker_init_fn=_prepare_worker,
        multiprocessing_context="fork",
    )
    steps = iter(loader)
    # Without this, multiprocessing would wait at exit for workers that ignore its SIGTERM.
    close = steps._shutdown_workers
    atexit.register(close)
    try:
        yield steps
    finally:
        close()
        atexit.unregister(close)


def _as_is(step: Step) -> Step:
    return step


def _prepare_worker(worker: int) -> None:
    """Slurm signals every process of a job step; what to do is decided by the training process alone.

    A worker whose training process was killed would wait for ever for a reader of its pipe.
    """
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
