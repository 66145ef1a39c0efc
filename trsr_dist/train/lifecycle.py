"""How a rank lives and ends: with its launcher, with signs of life, and for reasons that all ranks agree on.

Every rank notes in RUN/heartbeats what it does. The first and the last read all of them: a rank that is stuck or gone
is named and the training ended long before a collective's time limit.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from typing_extensions import TypedDict

from trsr_dist.environment import Ranks, die_with_parent, slurm_end_time
from trsr_dist.errors import DataError, RunError
from trsr_dist.files import read_json, write_json
from trsr_dist.liveness import Beat, Owner, read_sign, reader_time
from trsr_dist.processes import server_time_ns

LAUNCHER = b"deepspeed.launcher.launch"
POLL_SECONDS = 1.0
BEAT_SECONDS = 5.0
START, SAVING, END = "start", "saving", "end"
DATA, ROW, SUMS, UPDATE = "waiting for data", "row", "sums over ranks", "optimizer step"
VALIDATION, LOCKSTEP, METRICS = "validation", "validation in lockstep", "metrics over ranks"
UNLIMITED = (START, SAVING, END)
"""Phases that take what the model and the disk take."""
INDEPENDENT = (DATA, VALIDATION)
"""Phases in which a rank waits for no other one; a row may wait, at ZeRO stage 3."""
SLOW_FACTOR = 3.0
"""A phase may take this many times the longest of its kind that this rank has seen."""
EXIT_STUCK = 74
"""EX_IOERR: a rank was stuck or gone. Also in slurm/common.sh."""
STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ONE_EVENT_SECONDS = 10.0
"""One event may send several signals within this time: from the kernel, the launcher and the scheduler."""
SAFETY = 1.5
"""A step, a save and a validation are assumed to take up to this many times the longest seen."""


def follow_launcher() -> None:
    """From now on this process gets SIGTERM when its launcher dies, or the runner that started the launcher."""
    die_with_parent()
    launcher, command = os.getppid(), b""
    with suppress(OSError):
        command = Path(f"/proc/{launcher}/cmdline").read_bytes()
    if LAUNCHER in command:
        runner = _parent(launcher)
        threading.Thread(target=_watch, args=(launcher, runner), daemon=True).start()


def _watch(launcher: int, runner: int) -> None:
    wait = threading.Event().wait
    while _parent(launcher) == runner:
        wait(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent(pid: int) -> int:
    """Parent of a process; 0 where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


class RankFile(TypedDict):
    """What a rank tells of itself, beside what ``Owner`` holds."""

    __pydantic_config__ = {"extra": "allow"}
    rank: int
    world_size: int
    host: str
    pid: int
    step: int
    phase: str
    count: int
    """Phases of this step before this one."""
    idle_seconds: float
    """For which it is in this phase, at the time of writing."""
    is_late: bool
    """The phase takes longer than it may."""
    stack: list[str]
    """Calls of the main thread, the innermost first."""


class Phase(NamedTuple):
    """What a rank does, since when (seconds of the monotonic clock)."""

    step: int
    name: str
    count: int
    since: float

    @property
    def kind(self) -> str:
        return self.name.partition(" of ")[0]


class Heartbeat:
    """This rank's step and phase, written every few seconds by a thread, which on two ranks also looks at all others.

    Args:
        run_dir: the run's folder.
        ranks: this process.
        hang_seconds: ``train.hang_seconds``.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, hang_seconds: float) -> None:
        self._folder = run_dir / "heartbeats"
        self._path = self._folder / f"rank-{ranks.rank:05d}.json"
        self._ranks = ranks
        self._owner = replace(Owner.myself(), host=ranks.host, job=ranks.job_id, restart=ranks.restart)
        self._hang_seconds = hang_seconds
        self._beat_seconds = min(BEAT_SECONDS, hang_seconds / 4)
        self._phase = self._seen = Phase(0, START, 0, time.monotonic())
        self._longest: dict[str, float] = {}
        self._idle_seconds = 0.0
        self._looked = self._judged = time.monotonic()
        self._calm_since = math.inf
        self._beat: Beat | None = None

    def is_starting(self) -> bool:
        """Whether no step has begun."""
        return self._phase.name == START

    def start(self) -> None:
        self._write()
        self._beat = Beat(self._beat_seconds, self._watch)

    def at(self, step: int, phase: str) -> None:
        """Note what this rank does now."""
        before, now = self._phase, time.monotonic()
        self._longest[before.kind] = max(self._longest.get(before.kind, 0.0), now - before.since)
        self._phase = Phase(step, phase, before.count + 1 if step == before.step else 0, now)

    def stop(self) -> None:
        if self._beat is not None:
            self._beat.stop()
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):  # what went wrong before it matters more
            self._write()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _watch(self) -> None:
        # Where this thread does not run again, a call that never ends holds the interpreter's lock: C code names it.
        faulthandler.dump_traceback_later(self._hang_seconds, file=2)
        # A machine that was stopped, or a disk that did not answer this thread, has delayed the training as well.
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self._beat_seconds), now
        phase = self._phase
        self._idle_seconds = self._idle_seconds + passed if phase is self._seen else min(now - phase.since, passed)
        self._seen = phase
        self._write()
        if self._ranks.rank in (0, self._ranks.world_size - 1) and phase.kind not in (START, END):
            self._end_if_stuck()

    def _end_if_stuck(self) -> None:
        # Asked before the files are read: a disk that stalls in between must not age them.
        now = server_time_ns(self._folder) / 1e9
        beats = read_heartbeats(self._folder)
        before, self._judged = self._judged, time.monotonic()
        if self._judged - before > self._hang_seconds / 2:
            self._calm_since = math.inf  # what kept this rank from looking may have kept others from writing
            return
        self._calm_since = min(self._calm_since, now)
        stuck = stuck_ranks(beats, now, self._hang_seconds, self._calm_since)
        if not stuck:
            return
        text = describe_ranks(self._folder)
        first = min(stuck, key=lambda beat: beat["rank"])
        names = ", ".join(f"rank {beat['rank']} on {beat['host']} (pid {beat['pid']})" for beat in stuck)
        calls = "\n    ".join(["in these calls, the innermost first:", *first["stack"]])
        sys.stderr.write(
            f"rank {self._ranks.rank}: stuck: {names}, in step {first['step']}, {first['phase']}; ending\n"
            f"  rank {first['rank']} was at its last sign of life {calls}\nall ranks:\n{text}\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_STUCK)

    def _is_late(self) -> bool:
        """Never in the first phase of a kind, which compiles kernels and connects ranks."""
        longest = self._longest.get(self._seen.kind)
        if longest is None or self._seen.kind in UNLIMITED:
            return False
        return self._idle_seconds > max(self._hang_seconds, SLOW_FACTOR * longest)

    def _write(self) -> None:
        there = read_sign(self._path)
        if there is not None and self._owner.is_superseded_by(there.owner):
            return  # this process was cut off and its job runs elsewhere
        frame = sys._current_frames().get(threading.main_thread().ident)
        value = {
            **asdict(self._owner),
            "rank": self._ranks.rank,
            "world_size": self._ranks.world_size,
            "step": self._phase.step,
            "phase": self._phase.name,
            "count": self._phase.count,
            "idle_seconds": round(time.monotonic() - self._phase.since, 3),
            "is_late": self._phase is self._seen and self._is_late(),
            "stack": [f"{f.f_code.co_filename}:{line} {f.f_code.co_name}" for f, line in traceback.walk_stack(frame)],
        }
        write_json(self._path, value, durable=False)


def stuck_ranks(
    beats: list[dict[str, Any]], now: float, hang_seconds: float, since: float = 0.0
) -> list[dict[str, Any]]:
    """Who keeps a training from going on; empty where it goes on.

    Args:
        beats: of ``read_heartbeats``.
        now: Unix seconds by the file server's clock.
        hang_seconds: a rank without a sign of life for so long is gone.
        since: by that clock; silence before it does not count.
    """
    if silent := [beat for beat in beats if now - max(beat["time"], since) > hang_seconds]:
        return silent
    late = [beat for beat in beats if beat["is_late"]]
    if alone := [beat for beat in late if beat["phase"] in INDEPENDENT]:
        return alone
    if len(late) < len(beats):
        return []  # they wait for one that works
    behind = min((beat["step"], beat["count"]) for beat in beats)
    return [beat for beat in beats if (beat["step"], beat["count"]) == behind]


def read_heartbeats(folder: Path) -> list[dict[str, Any]]:
    """The last sign of life of every rank of the newest start, by rank, each with ``time``: Unix seconds of its writing
    by the file server's clock. Files that are not whole are left out.
    """
    beats = []
    for path in folder.glob("rank-*.json"):
        with suppress(DataError, OSError):
            beats.append(read_json(path, RankFile) | {"time": path.stat().st_mtime})
    beats.sort(key=lambda beat: beat["rank"])
    newest = max(beats, key=lambda beat: beat["time"], default=None)
    return [beat for beat in beats if beat["rank"] < newest["world_size"]] if newest else []


def describe_ranks(folder: Path) -> str:
    """Who was where: one line a rank, those furthest behind first."""
    beats = sorted(read_heartbeats(folder), key=lambda beat: (beat["step"], beat["count"], beat["time"]))
    now = reader_time(folder) if beats else 0.0
    return "\n".join(
        f"  rank {beat['rank']} on {beat['host']} (pid {beat['pid']}): step {beat['step']}, {beat['phase']} for "
        f"{beat['idle_seconds'] + now - beat['time']:.0f} s; last sign of life {now - beat['time']:.0f} s ago"
        for beat in beats
    )


def check_stop_file(run_dir: Path) -> None:
    """A run that was told to stop must not start: it would make one step at every start.

    Raises:
        RunError: the run folder holds a file named STOP.
    """
    if (run_dir / STOP_FILE).exists():
        raise RunError(f"{run_dir / STOP_FILE}: the run was told to stop; remove this file to go on")


class StopSignals:
    """Remembers the first signal; one of a later event ends the process at once, the last checkpoint is intact then.

    Args:
        is_starting: whether there is nothing to save yet. A process whose launcher is gone leaves then: it may wait for
            ranks that will never come.
    """

    def __init__(self, is_starting: Callable[[], bool] = lambda: False) -> None:
        self.received = ""
        self._since = 0.0
        self._is_starting, self._launcher = is_starting, os.getppid()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_starting() and os.getppid() != self._launcher:
            raise SystemExit(128 + number)
        if not self.received:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > ONE_EVENT_SECONDS:
            os._exit(128 + number)


class Walltime:
    """Whether another step, or a validation, and a save still fit.

    Args:
        end: Unix seconds at which the job is killed; None: never.
    """

    def __init__(self, end: float | None) -> None:
        self._end = end
        self._longest = {"step": 0.0, "save": 1.0, "validation": 0.0}

    def saw(self, what: Literal["step", "save", "validation"], seconds: float) -> None:
        """Note how long one took."""
        self._longest[what] = max(self._longest[what], seconds)

    def has_time_for(self, what: Literal["step", "validation"]) -> bool:
        """Whether one more and a save still fit; the first validation is assumed to take as long as a step."""
        seconds = max(self._longest["step"], self._longest[what]) + self._longest["save"]
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
        return not self._signals.received and (at_start or self.walltime.has_time_for("validation"))

    def reason(self) -> str:
        """Why to stop at this step's end; empty: go on."""
        if self._signals.received:
            return f"signal {self._signals.received}"
        if self._is_main and self._file.exists():
            return f"{self._file} was touched; remove it before the next start"
        if not self.walltime.has_time_for("step"):
            return "the job's time is nearly over"
        return ""
