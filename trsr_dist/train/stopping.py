"""Reasons to stop early: a signal to any rank, a touched file, the end of the allotted time. All ranks then agree."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from trsr_dist.environment import slurm_end_time
from trsr_dist.errors import RunError

STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ONE_EVENT_SECONDS = 10.0
"""One event may come as several signals within so long: from the kernel, the launcher and the scheduler."""
SAFETY = 1.5
"""A step, a save and a validation are reckoned to take so much longer than the longest seen."""


def check_stop_file(run_dir: Path) -> None:
    """A run that was told to stop must not start: it would make one step at every start.

    Raises:
        RunError: the run folder holds a file named STOP.
    """
    if (run_dir / STOP_FILE).exists():
        raise RunError(f"{run_dir / STOP_FILE}: the run was told to stop; remove this file to go on")


class StopSignals:
    """Remembers the first signal; one of a later event ends the process at once, the last checkpoint is intact then."""

    def __init__(self) -> None:
        self.received = ""
        self._since = 0.0
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > ONE_EVENT_SECONDS:
            os._exit(128 + number)

    def restore(self) -> None:
        """Give the signals back their usual meaning."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


class Walltime:
    """Whether another step, or a validation, and a save still fit.

    Args:
        end: Unix seconds at which the job is killed; None: never.
    """

    def __init__(self, end: float | None) -> None:
        self._end = end
        self._longest_step = 0.0
        self._longest_save = 1.0
        self._longest_validation = 0.0

    def saw_step(self, seconds: float) -> None:
        self._longest_step = max(self._longest_step, seconds)

    def saw_save(self, seconds: float) -> None:
        self._longest_save = max(self._longest_save, seconds)

    def saw_validation(self, seconds: float) -> None:
        self._longest_validation = max(self._longest_validation, seconds)

    def is_over(self) -> bool:
        """Whether the next step would leave too little time to save."""
        return not self._has(self._longest_step + self._longest_save)

    def has_time_for_validation(self) -> bool:
        """Whether a validation and a save still fit; the first one is reckoned to take as long as a step."""
        return self._has(max(self._longest_validation, self._longest_step) + self._longest_save)

    def _has(self, seconds: float) -> bool:
        return self._end is None or time.time() + SAFETY * seconds <= self._end


def walltime_of(limit_seconds: float) -> Walltime:
    """The limit of the config, counted from now; else the end of the Slurm job; else none."""
    return Walltime(time.time() + limit_seconds if limit_seconds else slurm_end_time())


class StopReasons:
    """What this rank knows; ``reason`` is asked once a step.

    Args:
        run_dir: watched for a file named STOP, by rank 0.
        signals: of this process.
        walltime: of the job.
        is_main: whether this is rank 0.
    """

    def __init__(self, run_dir: Path, signals: StopSignals, walltime: Walltime, is_main: bool) -> None:
        self._file = run_dir / STOP_FILE
        self._signals = signals
        self.walltime = walltime
        self._is_main = is_main

    def allow_validation(self, at_start: bool) -> bool:
        """Whether this rank has the time for one. No later start has more of it, so that at a start it may begin."""
        return not self._signals.received and (at_start or self.walltime.has_time_for_validation())

    def reason(self) -> str:
        """Why to stop at this step's end; empty: go on."""
        if self._signals.received:
            return f"signal {self._signals.received}"
        if self._is_main and self._file.exists():
            return f"{self._file} was touched; remove it before the next start"
        if self.walltime.is_over():
            return "the job's time is nearly over"
        return ""
