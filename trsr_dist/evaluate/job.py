"""The evaluation job: score the split's candidates over any number of workers, then reduce and report.

Without a model the baselines that need none are ranked alone: the bar, before anything is summarized or trained.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trsr_dist import distributed
from trsr_dist.config import Config
from trsr_dist.data.store import HistoryStore, check_files
from trsr_dist.environment import Ranks, array_task, detect_ranks
from trsr_dist.errors import RunError
from trsr_dist.evaluate.evaluation import Evaluation, trained_on_these_shards
from trsr_dist.evaluate.reduce import Reduction, rank_baselines
from trsr_dist.evaluate.report import baselines_text, publish
from trsr_dist.evaluate.score import (
    WAIT_SECONDS,
    claim_folder,
    clear_folder,
    complete,
    open_models,
    score_everything,
)
from trsr_dist.evaluate.users import DrawnLists, SplitUsers, StoredSplit
from trsr_dist.files import write_json, writing
from trsr_dist.locks import Claim, folder_lock
from trsr_dist.log import get_logger, setup_logging, show
from trsr_dist.model.artifacts import follow
from trsr_dist.run import RunFolder
from trsr_dist.shards.reader import ShardSet

log = get_logger("evaluate")


def evaluate(config: Config, model: str, *, output: str = "", force: bool = False) -> int:
    """Run the stage; see tools/evaluate.py.

    Args:
        config: of the run.
        model: merged folder, checkpoint or adapter; ``RUN/merged`` and the like stand for folders of the run.
        output: empty: ``RUN/evaluation``.
        force: score again.

    Raises:
        RunError: the output holds another evaluation, or another job is at work there.
        ConfigError: the config is not that of the prepared data, or tasks of an array are forced.
        ModelError: the model cannot be opened, or has other answers than the config.
        DataError: scores are missing or doubled, or a score is not finite.
    """
    ranks = detect_ranks()
    setup_logging(ranks.rank, "evaluate")
    run = RunFolder(Path(config.run.dir))
    folder = Path(output) if output else run.evaluation
    # A pointer such as checkpoints/best is followed once: it may move while the candidates are scored.
    job = Evaluation(config, run, str(follow(Path(run.resolve(model)))), folder)
    with writing(folder), ExitStack() as stack:
        _evaluate(job, ranks, force, stack)
    return 0


def evaluate_baselines(config: Config, output: str = "") -> int:
    """Rank with the asked baselines that need no language model, in one process; see tools/evaluate.py.

    Args:
        config: of the run.
        output: empty: ``RUN/evaluation``; the results go into its folder ``baselines``.

    Raises:
        RunError: the data are not prepared, or another process is at work there.
        ConfigError: the config is not that of the prepared data.
        DataError: the split has no users, or a trained baseline cannot be had.
    """
    ranks = detect_ranks()
    setup_logging(ranks.rank, "evaluate")
    if not ranks.is_main or array_task()[0]:
        return 0
    run = RunFolder(Path(config.run.dir))
    job = Evaluation(config, run, "", Path(output) if output else run.evaluation)
    path = job.baselines / f"{job.split}.json"
    with writing(job.baselines), folder_lock(job.baselines):
        results = rank_baselines(job)
        write_json(path, results)
    show(f"{baselines_text(results)}\nresults: {path}")
    return 0


def _evaluate(job: Evaluation, ranks: Ranks, force: bool, stack: ExitStack) -> None:
    with distributed.process_group(ranks, WAIT_SECONDS, always=bool(job.config.evaluate.deepspeed_config)):
        job = complete(job, force)
        # Rank 0 claims for all, until the results are there; the claim stays in its process.
        entries: list[Claim] = []
        distributed.on_rank_zero(lambda: entries.append(stack.enter_context(claim_folder(job))))
        # Rank 0 decides for all: another task of an array may finish between two looks.
        if distributed.on_rank_zero(lambda: job.is_done(force)):
            distributed.on_rank_zero(lambda: job.write_config(only_missing=True))
            log.info("%s: already evaluated with these settings; nothing to do (--force redoes it)", job.folder)
            return
        distributed.on_rank_zero(lambda: check_files(job.run.histories))
        store = HistoryStore(job.run.histories, check=False)
        split = StoredSplit(store, job.split)
        lists = {
            protocol: DrawnLists(protocol, store, split, **job.draws(), seed=job.config.run.seed)
            for protocol in job.protocols
        }
        shards = ShardSet(job.run.split(job.split))
        users = SplitUsers(shards, job.config.evaluate.max_users, job.config.run.seed, lists)
        models = open_models(job)
        shards.check_recent_items(models["model"].builder.recent_items)
        folders = score_everything(
            job, users, models, ranks, (lambda: clear_folder(job, entries[0])) if force else None
        )
    if ranks.is_main:
        reduce_scores(job, Reduction(job, users, split, store, folders), models["model"].provenance)


def reduce_scores(job: Evaluation, reduction: Reduction, provenance: dict[str, Any]) -> None:
    """Publish the results if all parts of all passes are there; otherwise other array tasks are still at work.

    Raises:
        DataError: the scores do not cover the split exactly.
        RunError: another process is publishing.
    """
    is_array = array_task()[1] > 1
    missing = {entry.name: parts for entry in job.passes if (parts := reduction.missing(entry))}
    if missing and is_array:
        counts = ", ".join(f"{name} {len(parts)}" for name, parts in missing.items())
        log.info("left to other tasks: parts of %s; the last task to finish writes the results", counts)
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(job.folder))
        except RunError as error:
            if not is_array:
                raise
            log.info("another task writes the results (%s)", error)
            return
        publish(job, reduction.run(provenance, trained_on_these_shards(job, provenance)))
