"""Reader processes: they outlive signals to the job step, but not the training process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shards.world import make_split
from trsr_dist.processes import process_start

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
