"""Signs of life of every rank in the run folder, and the end of a rank that is stuck.

A collective with a dead or stuck rank fails on the others after the process group's timeout. What each was doing
stands in RUN/heartbeats, so that the error can say who was where.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trsr_dist.environment import Ranks
from trsr_dist.errors import DataError
from trsr_dist.files import read_json, write_json
from trsr_dist.liveness import Beat, Owner, read_sign, reader_time

BEAT_SECONDS = 5.0
START = "start"
WARNING_SHARE = 0.45
"""Of the time without progress after which a rank ends itself: shortly before the collectives' timeout."""
EXIT_STUCK = 74
"""EX_IOERR: this rank made no progress and has ended itself."""


class RankFile(TypedDict):
    """What a rank tells of itself, beside what ``Owner`` holds."""

    __pydantic_config__ = {"extra": "allow"}
    rank: int
    world_size: int
    host: str
    pid: int
    step: int
    phase: str
    idle_seconds: float
    """For which it is in this phase, at the time of writing."""


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
        self._owner = replace(Owner.myself(), host=ranks.host, job=ranks.job_id, restart=ranks.restart)
        self._stuck_seconds = stuck_seconds
        self._state: tuple[int, str, float] = (0, START, time.monotonic())
        self._warned = 0.0
        self._beat: Beat | None = None

    def start(self) -> None:
        self._write()
        self._beat = Beat(BEAT_SECONDS, self._watch)

    def at(self, step: int, phase: str) -> None:
        """Note what this rank does now."""
        self._state = (step, phase, time.monotonic())

    def stop(self) -> None:
        if self._beat is not None:
            self._beat.stop()
        self._write()

    def _watch(self) -> None:
        with suppress(OSError):  # a full disk must not end the watch over this rank
            self._write()
        step, phase, since = self._state
        if phase == START:
            return  # loading takes what it takes; its collectives have limits of their own
        idle = time.monotonic() - since
        if idle > WARNING_SHARE * self._stuck_seconds and self._warned != since:
            # In time: NCCL's watchdog ends the process at its own limit without a word of ours.
            self._warned = since
            sys.stderr.write(f"rank {self._ranks.rank}: no progress; all ranks:\n{describe_ranks(self._folder)}\n")
        if idle > self._stuck_seconds:
            text = describe_ranks(self._folder)
            sys.stderr.write(f"rank {self._ranks.rank}: stuck in step {step}, phase {phase}; ending\n{text}\n")
            sys.stderr.flush()
            os._exit(EXIT_STUCK)

    def _write(self) -> None:
        there = read_sign(self._path)
        if there is not None and self._owner.is_superseded_by(there.owner):
            return  # this process was cut off and its job runs elsewhere
        step, phase, since = self._state
        value = {
            **asdict(self._owner),
            "rank": self._ranks.rank,
            "world_size": self._ranks.world_size,
            "step": step,
            "phase": phase,
            "idle_seconds": round(time.monotonic() - since, 3),
        }
        write_json(self._path, value, durable=False)


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
    beats = sorted(read_heartbeats(folder), key=lambda beat: (beat["step"], beat["time"]))
    now = reader_time(folder) if beats else 0.0
    return "\n".join(
        f"  rank {beat['rank']} on {beat['host']} (pid {beat['pid']}): step {beat['step']}, {beat['phase']} for "
        f"{beat['idle_seconds'] + now - beat['time']:.0f} s; last sign of life {now - beat['time']:.0f} s ago"
        for beat in beats
    )
