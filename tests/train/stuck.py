"""launch/train.py, whose rank 1 takes long to load and to save, and later loops in Python."""

from __future__ import annotations

import os
import runpy
import time
from collections.abc import Callable
from typing import Any

from trsr_dist.train import job
from trsr_dist.train.elastic import Saving
from trsr_dist.train.step import StepRunner

SLOW_SECONDS = 7.0
"""More than the run's hang_seconds."""
STUCK_STEP = 4


def slow(action: Callable[..., Any]) -> Callable[..., Any]:
    def act(*args: object) -> Any:
        time.sleep(SLOW_SECONDS)
        return action(*args)

    return act


def stuck_row(self: StepRunner, row: object, step: int, *rest: int) -> Any:
    while step == STUCK_STEP:
        pass
    return run_row(self, row, step, *rest)


run_row = StepRunner._run_row

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        job.build_trainer, Saving.save, StepRunner._run_row = slow(job.build_trainer), slow(Saving.save), stuck_row
    runpy.run_path("launch/train.py", run_name="__main__")
