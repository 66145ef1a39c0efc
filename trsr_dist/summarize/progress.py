"""What is seen from outside: a small file of each task, and what they and the committed units add up to.

A task at work reports in its file; one of all writes the totals to metrics.jsonl and the trackers.

RUN/summaries/progress/{settings}/job.json         splits and units of the job
RUN/summaries/progress/{settings}/{task}.json      what a task has done, rewritten every few seconds
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt
from typing_extensions import TypedDict

from trsr_dist.errors import DataError
from trsr_dist.files import read_json, write_json
from trsr_dist.hashing import digest
from trsr_dist.leases import LeaseFolder
from trsr_dist.liveness import reader_time
from trsr_dist.log import progress
from trsr_dist.metric_log import MetricLog
from trsr_dist.run import MANIFEST, Manifest, RunFolder, read_manifest
from trsr_dist.summarize.units import Failed, SplitWork

if TYPE_CHECKING:  # tools/status.py needs neither
    from trsr_dist.summarize.scheduler import Scheduler
    from trsr_dist.summarize.worker import Worker

JOB = "job.json"
METRICS_LEASE = "metrics"
PUBLISHED = "published"
WRITE_SECONDS = 10.0
"""Between two rewritings of a task's file."""
SILENT_SECONDS = 60.0
"""A task whose file is older than this is taken for dead."""
RATE_SECONDS = 120.0
"""Rates are those of the last minutes."""


@dataclass(slots=True)
class TaskProgress:
    """What one task has done since its start."""

    task: str
    host: str
    state: str = "running"
    """running, done, stopped (asked to end) or failed."""
    error: str = ""
    users: int = 0
    uncommitted: int = 0
    """Users finished in units that are not committed yet."""
    in_flight: int = 0
    """Users begun and not finished."""
    quarantined: int = 0
    """Failed users of units that are not committed yet."""
    nodes: int = 0
    cache_hits: int = 0
    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    users_per_second: float = 0.0
    tokens_per_second: float = 0.0
    """Read and written."""
    time: float = 0.0
    """Unix seconds of the last sign of life, by the file server's clock; of the writing by the task's own."""


class SplitFile(TypedDict):
    """A split of the job."""

    work: Annotated[str, Field(pattern=r"^[^/\x00]+$")]
    """Name of its work folder."""
    num_users: NonNegativeInt
    users_per_unit: PositiveInt


class JobFile(TypedDict):
    """What the job consists of."""

    splits: dict[str, SplitFile]


class PublishedManifest(Manifest, total=False):
    """What the manifest of a published set says of its job."""

    failed: list[Failed]


class Rates:
    """Growth per second over the last minutes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, tuple[float, ...]]] = deque([(clock(), ())])

    def update(self, *totals: float) -> tuple[float, ...]:
        """Growth per second of each total, all of them 0 at the beginning."""
        now = self._clock()
        self._marks.append((now, totals))
        while len(self._marks) > 2 and self._marks[1][0] <= now - RATE_SECONDS:
            self._marks.popleft()
        then, before = self._marks[0]
        elapsed = max(now - then, 1e-6)
        return tuple((total - old) / elapsed for total, old in zip(totals, before or (0.0,) * len(totals), strict=True))


@dataclass(frozen=True, slots=True)
class Overview:
    """The job as a whole."""

    num_users: int
    users_done: int
    in_flight: int
    quarantined: int
    nodes: int
    cache_hits: int
    tokens: int
    """Read and written, by all tasks since the job was first started."""
    users_per_second: float
    tokens_per_second: float
    splits: dict[str, str]
    """``published`` or how many units are committed, by split."""
    failures: list[dict[str, Any]]
    """Quarantined users of committed units: user, node, key, reason."""
    tasks: list[TaskProgress]
    """Those at work and those that failed."""

    @property
    def is_done(self) -> bool:
        return all(state == PUBLISHED for state in self.splits.values())

    @property
    def eta_seconds(self) -> float | None:
        """None where nothing moves."""
        left = self.num_users - self.users_done
        return left / self.users_per_second if self.users_per_second else None if left else 0.0

    @property
    def scalars(self) -> dict[str, float]:
        """By their TensorBoard names."""
        values = {
            "users_done": self.users_done,
            "users_in_flight": self.in_flight,
            "users_quarantined": self.quarantined,
            "nodes": self.nodes,
            "cache_hits": self.cache_hits,
            "users_per_second": self.users_per_second,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.eta_seconds is not None:
            values["eta_seconds"] = self.eta_seconds
        return {f"summarize/{name}": value for name, value in values.items()}


def write_job(folder: Path, works: dict[str, SplitWork]) -> None:
    """Say what the job consists of; every task writes the same."""
    splits = {
        split: {"work": work.folder.name, "num_users": work.num_users, "users_per_unit": work.users_per_unit}
        for split, work in works.items()
    }
    write_json(folder / JOB, {"splits": splits})


class ProgressReader:
    """Reads a job's progress again and again; committed units are read once.

    Args:
        run: the run folder.
        folder: ``RUN/summaries/progress/{settings}``.
    """

    def __init__(self, run: RunFolder, folder: Path) -> None:
        self.run = run
        self.folder = folder
        splits = read_json(folder / JOB, JobFile)["splits"]
        self._works = {
            split: SplitWork(run.summaries / "work" / facts["work"], split, facts["num_users"], facts["users_per_unit"])
            for split, facts in splits.items()
        }

    @classmethod
    def latest(cls, run: RunFolder) -> ProgressReader | None:
        """Of the job that was at work last; None where there has been none."""
        jobs = sorted((run.summaries / "progress").glob(f"*/{JOB}"), key=lambda path: path.stat().st_mtime)
        return cls(run, jobs[-1].parent) if jobs else None

    def read(self) -> Overview:
        """The state of the job at this moment."""
        tasks = read_tasks(self.folder)
        alive = [task for task in tasks if task.state == "running"]
        states, failures, users_done = {}, [], sum(task.uncommitted for task in alive)
        for split, work in self._works.items():
            path = self.run.split(split) / MANIFEST
            manifest = read_manifest(path.parent, PublishedManifest) if path.is_file() else {}
            name = work_name(split, manifest.get("settings", {}), manifest.get("inputs", {}))
            if manifest and name == work.folder.name:
                states[split], failed = PUBLISHED, manifest.get("failed", [])
                users_done += work.num_users
            else:
                units = work.committed() if work.folder.exists() else ()
                states[split], failed = f"{len(units)} of {work.num_units} units", work.failures()
                users_done += sum(len(work.users(unit)) for unit in units)
            failures += failed
        return Overview(
            num_users=sum(work.num_users for work in self._works.values()),
            users_done=users_done,
            in_flight=sum(task.in_flight for task in alive),
            quarantined=len(failures) + sum(task.quarantined for task in alive),
            nodes=sum(task.nodes for task in tasks),
            cache_hits=sum(task.cache_hits for task in tasks),
            tokens=sum(task.prompt_tokens + task.new_tokens for task in tasks),
            users_per_second=sum(task.users_per_second for task in alive),
            tokens_per_second=sum(task.tokens_per_second for task in alive),
            splits=states,
            failures=failures,
            tasks=[task for task in tasks if task.state in ("running", "failed")],
        )


def work_name(split: str, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Name of a split's work folder, which no other settings or inputs share."""
    return f"{split}-{digest([settings, inputs])[:12]}"


def read_tasks(folder: Path) -> list[TaskProgress]:
    """Files of all tasks; one that stopped writing without a word is taken for ``killed``."""
    tasks, now = [], reader_time(folder)
    for path in sorted(folder.glob("*.json")):
        if path.name == JOB:
            continue
        try:
            task = read_json(path, TaskProgress)
            task.time = path.stat().st_mtime
        except (DataError, FileNotFoundError):
            continue
        if task.state == "running" and now - task.time > SILENT_SECONDS:
            task.state = "killed"
        tasks.append(task)
    return tasks


def task_path(folder: Path, task: str) -> Path:
    """Where a task tells of itself."""
    return folder / f"{task}.json"


class Reporter:
    """Call ``update`` often; it writes every few seconds.

    One task at a time, whichever holds the lease, writes the numbers of the whole job to the metrics.

    Args:
        reader: of the job's progress.
        own: names this task; filled in here.
        leases: of the job.
        worker: whose progress it is.
        scheduler: of the same task.
        alone: show a progress bar.
        open_metrics: the log for the numbers of the whole job.
    """

    def __init__(
        self,
        reader: ProgressReader,
        own: TaskProgress,
        leases: LeaseFolder,
        worker: Worker,
        scheduler: Scheduler,
        alone: bool,
        open_metrics: Callable[[], MetricLog],
    ) -> None:
        self.own = own
        self.leases = leases
        self.worker = worker
        self.scheduler = scheduler
        self._open_metrics = open_metrics
        self._reader = reader
        self._rates = Rates()
        self._last = float("-inf")
        self._metrics: MetricLog | None = None
        self._bar = None
        if alone:
            overview = self._reader.read()
            total = overview.num_users - overview.users_done
            self._bar = progress(total=total, description="summarize", unit="user")

    def update(self, new_users: int = 0) -> None:
        """Take note of finished users; write if the last time is long enough ago."""
        self.own.users += new_users
        if self._bar is not None:
            self._bar.update(new_users)
        if time.monotonic() - self._last >= WRITE_SECONDS:
            self._write()

    def close(self, state: str, error: str = "") -> None:
        """Leave the last word; a disk that cannot be written any more is reported by others."""
        self.own.state, self.own.error = state, error
        with suppress(OSError):
            self._write()
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()

    def _write(self) -> None:
        own, counts = self.own, self.scheduler.counts
        own.uncommitted, own.in_flight = self.worker.num_uncommitted, self.scheduler.num_users
        own.quarantined = len(self.worker.uncommitted_failures)
        own.nodes, own.cache_hits, own.requests = counts.nodes, counts.cache_hits, counts.requests
        own.retries, own.prompt_tokens, own.new_tokens = counts.retries, counts.prompt_tokens, counts.new_tokens
        rates = self._rates.update(own.users, own.prompt_tokens + own.new_tokens)
        own.users_per_second, own.tokens_per_second = (round(rate, 3) for rate in rates)
        own.time = round(time.time(), 3)
        write_json(task_path(self._reader.folder, own.task), asdict(own))
        self._last = time.monotonic()
        if self._metrics is None and self.leases.acquire(METRICS_LEASE) is not None:
            self._metrics = self._open_metrics()
        if self._metrics is not None:
            overview = self._reader.read()
            self._metrics.write(overview.users_done, overview.scalars)
