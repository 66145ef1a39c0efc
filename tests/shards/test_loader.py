"""Reader processes: they outlive signals to the job step, but not the training process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shards.world import make_builder, make_split
from trsr_dist.processes import process_start
from trsr_dist.shards.measure import Measuring, Share, measure_lengths

ROOT = Path(__file__).parents[2]
TRAINING = """
import multiprocessing, os, signal, sys, time
from tests.shards.world import make_builder
from trsr_dist.shards.measure import Share
from trsr_dist.shards.plan import PackingSettings
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.stream import TrainStream
steps = iter(TrainStream(ShardSet(sys.argv[1]), make_builder(), PackingSettings(600, 64, 6, 0), Share(num_workers=2)))
next(steps)
workers = [child.pid for child in multiprocessing.active_children()]
for worker in workers:
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGUSR1)
next(steps)
print(*workers, flush=True)
if sys.argv[2] == "killed":
    time.sleep(3600)
"""


@pytest.mark.parametrize("end", ["killed", "regular"])
def test_no_worker_is_left_behind(tmp_path: Path, end: str) -> None:
    folder = make_split(tmp_path / "train").folder
    command = [sys.executable, "-c", TRAINING, str(folder), end]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in training.stdout.readline().split()]
    assert len(workers) == 2
    if end == "killed":
        training.kill()
    training.wait()
    while any(process_start(worker) for worker in workers):
        time.sleep(0.05)


def test_signals_to_the_job_step_do_not_end_the_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers have inherited the training's handlers."""
    measure, numbers = Measuring.measure, (signal.SIGTERM, signal.SIGUSR1)

    def signalled(self: Measuring, number: int, first: tuple[int, ...]) -> None:
        for name in numbers:
            os.kill(os.getpid(), name)
        measure(self, number, first)

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    monkeypatch.setattr(Measuring, "measure", signalled)
    before = [signal.signal(number, leave) for number in numbers]
    try:
        lengths = measure_lengths(make_split(tmp_path / "train"), make_builder(), Share(num_workers=2))
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert lengths.facts.num_samples == 200
