"""Reports a task's progress while it works: its file, the bar when alone, TensorBoard and metrics.jsonl for all."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from trsr_dist.leases import LeaseFolder
from trsr_dist.log import MetricLog, progress
from trsr_dist.run import RunFolder
from trsr_dist.summarize.progress import WRITE_SECONDS, ProgressReader, Rates, TaskProgress, write_task
from trsr_dist.summarize.scheduler import Scheduler
from trsr_dist.summarize.worker import Worker

METRICS_LEASE = "metrics"


class Reporter:
    """Call ``update`` often; it writes every few seconds.

    One task at a time, whichever holds the lease, writes the numbers of the whole job to the metrics.

    Args:
        run: the run folder.
        folder: of the job's progress.
        own: names this task; filled in here.
        leases: of the job.
        worker: whose progress it is.
        scheduler: of the same task.
        alone: show a progress bar.
        tensorboard: write TensorBoard events beside metrics.jsonl.
    """

    def __init__(
        self,
        run: RunFolder,
        folder: Path,
        own: TaskProgress,
        leases: LeaseFolder,
        worker: Worker,
        scheduler: Scheduler,
        alone: bool,
        tensorboard: bool,
    ) -> None:
        self.run = run
        self.folder = folder
        self.own = own
        self.leases = leases
        self.worker = worker
        self.scheduler = scheduler
        self.tensorboard = tensorboard
        self._reader = ProgressReader(run, folder)
        self._rates = Rates()
        self._last = float("-inf")
        self._metrics: MetricLog | None = None
        self._bar = self._open_bar() if alone else None

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

    def _open_bar(self) -> tqdm:
        overview = self._reader.read()
        return progress(total=overview.num_users - overview.users_done, description="summarize", unit="user")

    def _write(self) -> None:
        self._count()
        write_task(self.folder, self.own)
        self._last = time.monotonic()
        if self._metrics is None and self.leases.acquire(METRICS_LEASE) is not None:
            self._metrics = MetricLog(self.run.root, "summarize", self.tensorboard)
        if self._metrics is not None:
            overview = self._reader.read()
            self._metrics.write(overview.users_done, overview.scalars)

    def _count(self) -> None:
        own, counts = self.own, self.scheduler.counts
        own.uncommitted, own.in_flight = self.worker.num_uncommitted, self.scheduler.num_users
        own.quarantined = len(self.worker.uncommitted_failures)
        own.nodes, own.cache_hits, own.requests = counts.nodes, counts.cache_hits, counts.requests
        own.retries, own.prompt_tokens, own.new_tokens = counts.retries, counts.prompt_tokens, counts.new_tokens
        rates = self._rates.update(own.users, own.prompt_tokens + own.new_tokens)
        own.users_per_second, own.tokens_per_second = (round(rate, 3) for rate in rates)
