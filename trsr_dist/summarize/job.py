"""The summarization job: units of users are claimed, summarized on one engine, committed and published.

The same code runs as one process and as any number of tasks (srun, torchrun, a Slurm array). Tasks meet only in the run
folder. A task ends when the sets of all splits are published, whoever did the work.
"""

from __future__ import annotations

import signal
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from trsr_dist.cli import EXIT_REQUEUE
from trsr_dist.config import Config, dump_config
from trsr_dist.data.store import HistoryStore
from trsr_dist.environment import Ranks, array_task, detect_ranks
from trsr_dist.errors import RunError
from trsr_dist.hashing import digest
from trsr_dist.log import get_logger, setup_logging
from trsr_dist.prompts.wording import WORDING_VERSION
from trsr_dist.run import RunFolder, is_finished
from trsr_dist.summarize.cache import TextCache
from trsr_dist.summarize.engines.build import build_engine, engine_identity
from trsr_dist.summarize.leases import LeaseFolder, Owner
from trsr_dist.summarize.plans import PLANS
from trsr_dist.summarize.scheduler import Scheduler
from trsr_dist.summarize.units import SplitWork
from trsr_dist.summarize.worker import Recipe, Worker

SPLITS = ("train", "valid", "test")
WAIT_SECONDS = 0.5
"""Between two looks at units that other tasks hold."""

log = get_logger("summarize")


@dataclass(frozen=True, slots=True)
class Task:
    """This process among all tasks of the job."""

    index: int
    count: int
    name: str
    ranks: Ranks

    @classmethod
    def detect(cls) -> Task:
        ranks, (part, num_parts) = detect_ranks(), array_task()
        index = part * ranks.world_size + ranks.rank
        name = f"{index:05d}-{ranks.host}-{uuid.uuid4().hex[:12]}"
        return cls(index, num_parts * ranks.world_size, name, ranks)


def summarize(config: Config, force: bool = False, dry_run: bool = False) -> int:
    """Run this task's share of the job; returns when the shards of all splits are published.

    Raises:
        RunError: the shards there were made with other settings or inputs, and ``force`` is not given.
        EngineError: users failed and the policy says stop.
    """
    task = Task.detect()
    setup_logging(task.index, "summarize")
    run = RunFolder(Path(config.run.dir))
    if dry_run:
        print(dump_config(config))
        print(describe(config, HistoryStore(run.histories)))
        return 0
    store = HistoryStore(run.histories)
    job = Job(config, run, store, task, force)
    if not job.unpublished:
        log.info("%s: nothing to do, the shards of %s are there", run.shards, ", ".join(SPLITS))
        return 0
    signal.signal(signal.SIGTERM, _stop)
    job.run()
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave by way of the ``finally`` blocks, so that leases are given back at once."""
    sys.exit(EXIT_REQUEUE)


class Job:
    """Everything a task needs, put together from the config."""

    def __init__(self, config: Config, run: RunFolder, store: HistoryStore, task: Task, force: bool) -> None:
        self.config = config
        self.run_folder = run
        self.store = store
        self.task = task
        self.identity = engine_identity(config.summarize, run.resolve(config.summarize.model), config.run.seed)
        self.settings = shard_settings(config, self.identity)
        self.inputs = {"histories": store.manifest_hash}
        self.replace = force
        redo = force and task.count == 1
        self.unpublished = {split: self._work(split) for split in SPLITS if redo or not self._is_published(split)}

    def run(self) -> None:
        """Work until every split is published."""
        if self.task.index == 0:
            self.run_folder.write_config("summarize", dump_config(self.config))
        for work in self.unpublished.values():
            work.open()
        summaries = self.run_folder.summaries
        owner = Owner.myself(self.task.name, self.task.ranks.job_id, self.task.ranks.restart)
        leases = LeaseFolder(summaries / "leases", owner, self.config.summarize.lease_seconds)
        cache = TextCache(summaries / "journal", self.task.name)
        try:
            self._work_on(leases, cache)
        finally:
            leases.close()
            cache.close()

    def _work_on(self, leases: LeaseFolder, cache: TextCache) -> None:
        works = list(self.unpublished.values())
        first = self.task.index / self.task.count
        worker = Worker(self.store, works, leases, self._recipe(), self.task.name, first)
        settings = self.config.summarize
        engine = build_engine(settings, self.run_folder.resolve(settings.model))
        scheduler = Scheduler(
            engine,
            self.identity,
            cache,
            self.config.domain,
            settings.max_new_tokens,
            settings.temperature,
            self.config.run.seed,
        )
        try:
            while self.unpublished:
                for result in scheduler.run(worker.next_work):
                    worker.take(result)
                    worker.abandon_lost()
                self._publish(leases)
                if self.unpublished:
                    time.sleep(WAIT_SECONDS)
                    cache.refresh()
        finally:
            engine.close()

    def _publish(self, leases: LeaseFolder) -> None:
        for split, work in list(self.unpublished.items()):
            if (self.task.count > 1 or not work.folder.exists()) and self._is_published(split):
                del self.unpublished[split]
            elif not work.folder.exists():
                raise RunError(f"{work.folder}: removed while this task was at work; run the stage again")
            elif work.is_complete():
                with leases.holding(f"{work.folder.name}-publish") as mine:
                    if mine and self._publish_split(split, work):
                        del self.unpublished[split]

    def _publish_split(self, split: str, work: SplitWork) -> bool:
        units = [work.facts(unit) for unit in range(work.num_units)]
        counts: Counter[str] = Counter()
        for unit in units:
            counts.update(unit["counts"])
        failed = [row for unit in units for row in unit["failed"]]
        num_users = sum(unit["num_users"] for unit in units)
        facts = {"split": split, "num_users": num_users, "failed": failed, "counts": dict(sorted(counts.items()))}
        target = self.run_folder.split(split)
        if not work.publish(target, self.task.name, self.settings, self.inputs, **facts):
            return False
        work.clear(self.task.name)
        log.info("%s: %d users in %d shards, %d failed", target, num_users, work.num_units, len(failed))
        return True

    def _is_published(self, split: str) -> bool:
        try:
            return is_finished(self.run_folder.split(split), self.settings, self.inputs)
        except RunError:
            if self.replace:
                return False
            raise

    def _work(self, split: str) -> SplitWork:
        name = f"{split}-{digest([self.settings, self.inputs])[:12]}"
        folder = self.run_folder.summaries / "work" / name
        return SplitWork(folder, split, self.store.num_users(split), self.config.summarize.users_per_shard)

    def _recipe(self) -> Recipe:
        settings = self.config.summarize
        return Recipe(
            plan=partial(PLANS[settings.scheme], block_size=settings.block_size, fan_in=settings.fan_in),
            domain=self.config.domain,
            num_recent=self.config.prompt.recent_items,
            repeated_kept=self.config.data.repeated_target == "keep",
            failed_users=settings.failed_users,
            max_failures=settings.max_failures,
            provenance={
                "scheme": settings.scheme,
                "summarizer": self.identity,
                "wording": WORDING_VERSION,
                "seed": self.config.run.seed,
            },
        )


def shard_settings(config: Config, identity: dict[str, Any]) -> dict[str, Any]:
    """Every setting that the bytes of the shards depend on."""
    settings = config.summarize
    return {
        "scheme": settings.scheme,
        "block_size": settings.block_size,
        "fan_in": settings.fan_in,
        "summarizer": identity,
        "wording": WORDING_VERSION,
        "domain": config.domain,
        "recent_items": config.prompt.recent_items,
        "failed_users": settings.failed_users,
        "users_per_shard": settings.users_per_shard,
        "repeated_target": config.data.repeated_target,
        "seed": config.run.seed,
    }


def describe(config: Config, store: HistoryStore) -> str:
    """The plan in words: users, units, prompts."""
    settings = config.summarize
    lines = []
    for split in SPLITS:
        num_users = store.num_users(split)
        looked_at = range(min(num_users, 1000))
        nodes = sum(
            len(PLANS[settings.scheme](len(store.user(split, i).history), settings.block_size, settings.fan_in))
            for i in looked_at
        )
        per_user = nodes / max(len(looked_at), 1)
        lines.append(
            f"{split}: {num_users} users in {-(-num_users // settings.users_per_shard)} units, about "
            f"{per_user:.1f} prompts a user, {per_user * num_users:.0f} in all"
        )
    return "\n".join(lines)
