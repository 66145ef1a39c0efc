"""Signs of life of every rank in the run folder, and the end of a rank that is stuck.

A collective with a dead or stuck rank fails on the others after the process group's timeout. What each was doing
stands in RUN/heartbeats, so that the error can say who was where.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trsr_dist.environment import Ranks
from trsr_dist.errors import DataError
from trsr_dist.files import read_json, temporary_name

BEAT_SECONDS = 5.0
START = "start"
WARNING_SHARE = 0.45
"""Of the time without progress after which a rank ends itself: shortly before the collectives' timeout."""
EXIT_STUCK = 74
"""EX_IOERR: this rank made no progress and has ended itself."""


class Beat(TypedDict):
    """What a rank tells of itself."""

    __pydantic_config__ = {"extra": "allow"}
    rank: int
    world_size: int
    host: str
    pid: int
    job: str
    restart: int
    step: int
    phase: str
    since: float
    """Unix seconds since when it is in this phase."""
    time: float
    """Unix seconds of this writing."""


class Heartbeat:
    """This rank's step and phase, written every few seconds by a thread.

    Args:
        run_dir: the run's folder.
        ranks: this process.
        stuck_seconds: without a change for so long the process ends; the collectives' timeout should come first.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, stuck_seconds: float) -> None:
        self._folder = run_dir / "heartbeats"
        self._path = self._folder / f"rank-{ranks.rank:05d}.json"
        self._ranks = ranks
        self._stuck_seconds = stuck_seconds
        self._state: tuple[int, str, float] = (0, START, time.time())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """Note what this rank does now."""
        self._state = (step, phase, time.time())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    def _run(self) -> None:
        warned = 0.0
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(OSError):  # a full disk must not end the watch over this rank
                self._write()
            step, phase, since = self._state
            if phase == START:
                continue  # loading takes what it takes; its collectives have limits of their own
            if time.time() - since > WARNING_SHARE * self._stuck_seconds and warned != since:
                # In time: NCCL's watchdog ends the process at its own limit without a word of ours.
                warned = since
                sys.stderr.write(f"rank {self._ranks.rank}: no progress; all ranks:\n{describe_ranks(self._folder)}\n")
            if time.time() - since > self._stuck_seconds:
                text = describe_ranks(self._folder)
                sys.stderr.write(f"rank {self._ranks.rank}: stuck in step {step}, phase {phase}; ending\n{text}\n")
                sys.stderr.flush()
                os._exit(EXIT_STUCK)

    def _write(self) -> None:
        if self._is_superseded():
            return
        step, phase, since = self._state
        value = {
            "rank": self._ranks.rank,
            "world_size": self._ranks.world_size,
            "host": self._ranks.host,
            "pid": os.getpid(),
            "job": self._ranks.job_id,
            "restart": self._ranks.restart,
            "step": step,
            "phase": phase,
            "since": round(since, 3),
            "time": round(time.time(), 3),
        }
        temporary = temporary_name(self._path)
        temporary.write_text(json.dumps(value), encoding="utf-8")
        os.replace(temporary, self._path)

    def _is_superseded(self) -> bool:
        """Whether a later start of this Slurm job beats here: this process was cut off and its job runs elsewhere."""
        try:
            there = read_json(self._path, Beat)
        except DataError:
            return False
        return there.get("job") == self._ranks.job_id and there.get("restart", 0) > self._ranks.restart


def read_heartbeats(folder: Path) -> list[dict[str, Any]]:
    """The last sign of life of every rank of the newest start, by rank; of some there may be none that is whole."""
    beats = []
    for path in folder.glob("rank-*.json"):
        with suppress(DataError, OSError):
            beats.append(read_json(path, Beat))
    beats.sort(key=lambda beat: beat["rank"])
    newest = max(beats, key=lambda beat: beat["time"], default=None)
    return [beat for beat in beats if beat["rank"] < newest["world_size"]] if newest else []


def describe_ranks(folder: Path) -> str:
    """Who was where: one line a rank, those furthest behind first."""
    now = time.time()
    beats = sorted(read_heartbeats(folder), key=lambda beat: (beat["step"], beat["time"]))
    return "\n".join(
        f"  rank {beat['rank']} on {beat['host']} (pid {beat['pid']}): step {beat['step']}, {beat['phase']} for "
        f"{now - beat['since']:.0f} s; last sign of life {now - beat['time']:.0f} s ago"
        for beat in beats
    )
