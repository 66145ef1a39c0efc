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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from trsr_dist.cli import EXIT_REQUEUE
from trsr_dist.config import Config, dump_config
from trsr_dist.data.store import HistoryStore
from trsr_dist.environment import Ranks, detect_ranks, task_number
from trsr_dist.errors import DataError, EngineError, ModelError, RunError, TrsrError
from trsr_dist.files import recover_folder, sweep, writing
from trsr_dist.hashing import digest, hash64
from trsr_dist.leases import LeaseFolder
from trsr_dist.liveness import Owner, touching
from trsr_dist.locks import claim
from trsr_dist.log import get_logger, setup_logging
from trsr_dist.printable import strike_addresses
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import WORDING_VERSION
from trsr_dist.run import SPLITS, RunFolder, is_finished
from trsr_dist.shards.measure import Share, measure_share
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize.cache import TextCache
from trsr_dist.summarize.engines.build import build_engine, engine_identity, revision_to_load
from trsr_dist.summarize.plans import planner, writer
from trsr_dist.summarize.progress import (
    WRITE_SECONDS,
    ProgressReader,
    Reporter,
    TaskProgress,
    task_path,
    work_name,
    write_job,
)
from trsr_dist.summarize.requests import LazyEngine
from trsr_dist.summarize.scheduler import Scheduler
from trsr_dist.summarize.units import SplitWork
from trsr_dist.summarize.worker import Recipe, Worker
from trsr_dist.trackers import open_metrics

GONE_SECONDS = 90.0
"""NFS clients keep what they know of a folder for 60 seconds by default."""

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
        ranks, (index, count) = detect_ranks(), task_number()
        return cls(index, count, f"{index:05d}-{ranks.host}-{uuid.uuid4().hex[:12]}", ranks)


def summarize(config: Config, force: bool = False) -> int:
    """Run this task's share of the job; returns when the shards of all splits are published.

    Raises:
        RunError: the shards there were made with other settings or inputs and ``force`` is not given, or the run folder
            cannot be written.
        EngineError: users failed and the policy says stop, or the engine is gone.
    """
    task = Task.detect()
    setup_logging(task.index, "summarize")
    run = RunFolder(Path(config.run.dir))
    store = HistoryStore(run.histories)
    earlier = signal.signal(signal.SIGTERM, _stop)
    try:
        with writing(run.root):
            if config.summarize.samples:
                for number in range(config.summarize.samples):
                    complete(Job(sample_config(config, number), run.sample(number), store, task, force, ("train",)))
            else:
                complete(Job(config, run, store, task, force))
                measure_ahead(config, run, task)
    finally:
        signal.signal(signal.SIGTERM, earlier)
    return 0


def complete(job: Job) -> None:
    """Work until the job's sets are published."""
    job.tidy()
    if job.unpublished:
        job.run()
    else:
        job.write_config(only_missing=True)
        log.info("%s: nothing to do, the shards of %s are there", job.run_folder.shards, ", ".join(job.works))


def sample_config(config: Config, number: int) -> Config:
    """The config of one of ``summarize.samples``: it differs by the sampling's seed alone."""
    seed = hash64(config.run.seed, "sample", number) >> 1
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave by way of the ``finally`` blocks, which give the leases back; a second signal must not end that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(EXIT_REQUEUE)


class Job:
    """Everything a task needs, put together from the config."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        store: HistoryStore,
        task: Task,
        force: bool,
        splits: Sequence[str] = SPLITS,
    ) -> None:
        self.config = config
        self.run_folder = run
        self.store = store
        self.task = task
        whole = RunFolder(Path(config.run.dir))  # a sample's own folder knows neither the model nor its commit
        self.model = whole.resolve(config.summarize.model)
        self.identity = engine_identity(config.summarize, self.model, config.run.seed, whole.summaries)
        self.settings = shard_settings(config, self.identity)
        self.inputs = {"histories": store.manifest_hash}
        self.digest = digest([self.settings, self.inputs])
        self.progress_folder = run.summaries / "progress" / self.digest[:12]
        self.replace = force
        self.redo = force and task.count == 1
        """Redo finished sets. Of several tasks, none could tell an old set from what another has just made."""
        self._gone_since: dict[str, float] = {}
        for split in splits:
            recover_folder(run.split(split), locked=False)
        self.works: dict[str, SplitWork] = {}
        for split in splits:
            folder = run.summaries / "work" / work_name(split, self.settings, self.inputs)
            self.works[split] = SplitWork(folder, split, store.num_users(split), config.summarize.users_per_shard)
        self.unpublished = {s: work for s, work in self.works.items() if self.redo or not self._is_published(s)}
        if force and not self.redo and not self.unpublished:
            log.warning(
                "--force with several tasks replaces only sets of other settings; one process redoes finished ones"
            )

    def tidy(self) -> None:
        """Remove what a task left behind that was killed right after publishing."""
        for split in self.works.keys() - self.unpublished.keys():
            self.works[split].clear()
        for folder in ("work", "leases"):
            sweep(self.run_folder.summaries / folder, GONE_SECONDS)

    def write_config(self, only_missing: bool = False) -> None:
        if self.task.index == 0:
            self.run_folder.write_config("summarize", dump_config(self.config), only_missing)

    def run(self) -> None:
        """Work until every split is published.

        Raises:
            RunError: a job of other settings or inputs is at work here.
        """
        run, settings = self.run_folder, self.config.summarize
        with claim(run.summaries, self.digest, {**self.settings, **self.inputs}):
            num_units = sum(work.num_units for work in self.unpublished.values())
            if self.task.index == 0 and self.task.count > num_units:
                log.warning(
                    "%d tasks, %d units: the others wait, without a model; lower summarize.users_per_shard, or take "
                    "fewer tasks",
                    self.task.count, num_units,
                )  # fmt: skip
            self.write_config()
            check_one_file_system(run.summaries, run.shards)
            write_job(self.progress_folder, self.works)
            for work in self.unpublished.values():
                if self.redo:
                    work.clear()
                work.open()
            leases = LeaseFolder(run.summaries / "leases", Owner.myself(self.task.name), settings.lease_seconds)
            cache = TextCache(run.summaries / "journal", self.task.name)
            try:
                with touching(task_path(self.progress_folder, self.task.name), WRITE_SECONDS):
                    self._with_engine(leases, cache)
            finally:
                leases.close()
                cache.close()

    def _with_engine(self, leases: LeaseFolder, cache: TextCache) -> None:
        works, first = list(self.unpublished.values()), self.task.index / self.task.count
        settings = self.config.summarize
        # A text without a model costs no more to write again than to look for among those of all other tasks.
        refresh = cache.refresh if settings.asks_model else lambda: None
        worker = Worker(self.store, works, leases, self._recipe(), self.task.name, first, refresh)
        revision = revision_to_load(settings, self.identity)
        engine = LazyEngine(lambda: build_engine(settings, self.model, revision, self.task.ranks.local_rank))
        scheduler = Scheduler(
            engine,
            self.identity,
            cache,
            self.config.domain,
            settings.max_new_tokens,
            settings.temperature,
            self.config.run.seed,
        )
        reporter = Reporter(
            ProgressReader(self.run_folder, self.progress_folder),
            TaskProgress(self.task.name, self.task.ranks.host),
            leases,
            worker,
            scheduler,
            alone=self.task.count == 1,
            open_metrics=lambda: open_metrics(self.config, self.run_folder.root, "summarize"),
        )
        state, message = "stopped", ""
        try:
            self._work_on(worker, scheduler, leases, reporter)
            state = "done"
        except Exception as error:
            kind = "" if isinstance(error, TrsrError) else f"{type(error).__name__}: "
            state, message = "failed", strike_addresses(f"{kind}{error}")
            raise
        finally:
            reporter.close(state, message)
            engine.close()

    def _work_on(self, worker: Worker, scheduler: Scheduler, leases: LeaseFolder, reporter: Reporter) -> None:
        reporter.update()
        while True:
            self._publish(leases)
            if not self.unpublished:
                return
            for result in scheduler.run(worker.next_work):
                worker.take(result)
                worker.abandon_lost()
                reporter.update(new_users=1)
            self._publish(leases)
            if self.unpublished:
                time.sleep(leases.look_seconds)
                reporter.update()

    def _publish(self, leases: LeaseFolder) -> None:
        """Publish what is complete; take note of what others have published."""
        for split, work in list(self.unpublished.items()):
            gone = not work.folder.exists()  # asked first: others publish, then remove the folder
            if not self.redo and self._is_published(split):
                work.clear()
            elif gone:  # as soon as its set is published; NFS may show the one before the other
                now = time.monotonic()
                if now - self._gone_since.setdefault(split, now) > GONE_SECONDS:
                    raise RunError(f"{work.folder}: removed while this task was at work; run the stage again")
                continue
            elif not work.is_complete():
                continue
            else:
                with leases.holding(f"{work.folder.name}-publish") as mine:
                    if not (mine and work.folder.exists() and self._publish_split(split, work)):
                        continue
            del self.unpublished[split]

    def _publish_split(self, split: str, work: SplitWork) -> bool:
        units = [work.facts(unit) for unit in range(work.num_units)]
        counts: Counter[str] = Counter()
        for unit in units:
            counts.update(unit["counts"])
        failed = [failure for unit in units for failure in unit["failed"]]
        if len(failed) > self.config.summarize.max_failures:
            raise EngineError(
                f"{split}: {len(failed)} users failed, {failed[0]['user']!r} among them: {failed[0]['reason']}; raise "
                f"summarize.max_failures to publish without them, or remove {work.folder} to try them again"
            )
        num_users = sum(unit["num_users"] for unit in units)
        if work.num_users and not num_users:
            raise EngineError(
                f"{split}: all {len(failed)} users failed, {failed[0]['user']!r} among them: {failed[0]['reason']}; "
                f"remove the cause and {work.folder}, and run the stage again"
            )
        facts = {"split": split, "num_users": num_users, "failed": failed, "counts": dict(sorted(counts.items()))}
        target = self.run_folder.split(split)
        if not work.publish(target, self.task.name, self.settings, self.inputs, **facts):
            return False
        work.clear()
        told = "".join(f", {name} {number}" for name, number in facts["counts"].items())
        log.info("%s: %d users in %d shards, %d failed%s", target, num_users, work.num_units, len(failed), told)
        return True

    def _is_published(self, split: str) -> bool:
        return is_finished(self.run_folder.split(split), self.settings, self.inputs, replace=self.replace)

    def _recipe(self) -> Recipe:
        settings = self.config.summarize
        return Recipe(
            plan=partial(planner(settings.scheme), block_size=settings.block_size, fan_in=settings.fan_in),
            text=partial(
                writer(settings.scheme), num_recent=self.config.prompt.recent_items, max_words=settings.max_new_tokens
            ),
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


def measure_ahead(config: Config, run: RunFolder, task: Task) -> None:
    """Measure this task's share of the train split's token lengths, so that no GPU waits for it; without the base's
    tokenizer here, the training measures."""
    base = run.resolve(config.model.name_or_path)
    if not (Path(base) / "tokenizer_config.json").is_file():
        return
    from trsr_dist.pretrained import BaseSource, load_tokenizer  # loads torch, which nothing else here may need

    try:
        tokenizer = load_tokenizer(BaseSource(base, trust_remote_code=config.model.trust_remote_code))
        builder = PromptBuilder(tokenizer, **config.prompt.model_dump())
        measure_share(ShardSet(run.split("train")), builder, Share(task.index, task.count))
    except (DataError, ModelError) as error:
        log.warning("the shards are written; their token lengths could not be measured: %s", error)


def check_one_file_system(summaries: Path, shards: Path) -> None:
    """A finished set moves from one to the other by a rename.

    Raises:
        RunError: they lie on two file systems.
    """
    summaries.mkdir(parents=True, exist_ok=True)
    if shards.exists() and shards.stat().st_dev != summaries.stat().st_dev:
        raise RunError(
            f"{shards}: on another file system than {summaries}, from where finished shards are renamed; let both, or "
            "the whole run folder, be links to one file system"
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
