"""The evaluation job: score the split's candidates over any number of workers, then reduce and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trsr_dist import distributed
from trsr_dist.config import Config, dump_config
from trsr_dist.environment import Ranks, array_task, detect_ranks
from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.passes import PartWorker
from trsr_dist.evaluate.reduce import reduce_scores
from trsr_dist.evaluate.split import SplitUsers
from trsr_dist.log import get_logger, setup_logging
from trsr_dist.model.folder import LoadedModel, open_model
from trsr_dist.model.forward import score_row
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.rows import PackedRow
from trsr_dist.run import RunFolder
from trsr_dist.shards.reader import ShardSet

log = get_logger("evaluate")


def evaluate(config: Config, model: str, *, output: str = "", force: bool = False, dry_run: bool = False) -> int:
    """Run the stage; see tools/evaluate.py.

    Args:
        config: of the run.
        model: merged folder, checkpoint or adapter; ``RUN/merged`` and the like stand for folders of the run.
        output: empty: ``RUN/evaluation``.
        force: score anew.
        dry_run: print config and plan; touch nothing.

    Raises:
        RunError: the output holds another evaluation.
        ModelError: the model cannot be opened, or has other answers than the config.
        DataError: scores are missing or doubled, or a score is not finite.
    """
    ranks = detect_ranks()
    setup_logging(ranks.rank, "evaluate")
    run = RunFolder(Path(config.run.dir))
    folder = Path(output) if output else run.evaluation
    job = Evaluation(config, run, run.resolve(model), run.resolve(config.model.name_or_path), folder)
    users = SplitUsers(ShardSet(run.split(job.split)), config.evaluate.max_users, config.run.seed)
    if dry_run:
        print(dump_config(config) + plan_text(job, users, ranks))
        return 0
    if job.is_done(force):
        log.info("%s: already evaluated with these settings; nothing to do (--force redoes it)", job.folder)
        return 0
    provenance = score_everything(job, users, ranks, force)
    if ranks.is_main:
        reduce_scores(job, users, provenance)
    return 0


def plan_text(job: Evaluation, users: SplitUsers, ranks: Ranks) -> str:
    """What the stage would read, compute and write."""
    worker = make_worker(job, users, ranks)
    names = ", ".join(entry.name for entry in job.passes)
    return "\n".join(
        (
            "# plan",
            f"# {len(users)} users of {job.run.split(job.split)} in {len(worker.parts)} parts, {len(worker.mine)} of "
            "them for this process",
            f"# passes with a language model: {names}",
            f"# write {job.results}, {job.folder}, {job.output / 'report.html'}",
        )
    )


def make_worker(job: Evaluation, users: SplitUsers, ranks: Ranks) -> PartWorker:
    """This process among all ranks of all array tasks."""
    task, num_tasks = array_task()
    worker, num_workers = task * ranks.world_size + ranks.rank, num_tasks * ranks.world_size
    return PartWorker(users, job.config.evaluate.row_tokens, worker, num_workers)


def score_everything(job: Evaluation, users: SplitUsers, ranks: Ranks, force: bool) -> dict[str, Any]:
    """Score this process's parts of every pass, then wait for the other ranks. Returns the model's provenance."""
    if force and array_task()[1] > 1:
        raise ConfigError("--force in a Slurm array would remove what other tasks write; remove the folder before")
    with distributed.process_group(ranks):
        if ranks.is_main and force:
            job.clear()
        distributed.barrier()
        worker = make_worker(job, users, ranks)
        loaded = load(job, job.model, ranks)
        builder, provenance = check_answers(job, loaded.builder), loaded.provenance
        run_passes(job, worker, "model", loaded, builder)
        del loaded
        if any(entry.source == "base" for entry in job.passes):
            base = load(job, job.base, ranks)
            run_passes(job, worker, "base", base, PromptBuilder(base.tokenizer, **builder.settings))
        distributed.barrier()
    return provenance


def load(job: Evaluation, name_or_path: str, ranks: Ranks) -> LoadedModel:
    """Open a model on this rank's device."""
    device = distributed.device_of(ranks)
    if device.type == "cpu":
        # Matrix products split their sums by threads: one thread gives the same digits for any number of ranks.
        torch.set_num_threads(1)
    return open_model(
        name_or_path,
        device=device,
        dtype=getattr(torch, job.precision),
        prompt=job.config.prompt.model_dump(),
        attention=job.config.model.attention,
        trust_remote_code=job.config.model.trust_remote_code,
    )


def check_answers(job: Evaluation, builder: PromptBuilder) -> PromptBuilder:
    """The model's builder, if its answers are those of the config.

    Raises:
        ModelError: they are not.
    """
    if tuple(builder.answers) != tuple(job.config.prompt.answers):
        raise ModelError(
            f"{job.model}: trained to answer {tuple(builder.answers)}, prompt.answers is "
            f"{tuple(job.config.prompt.answers)}; set prompt.answers to the model's"
        )
    return builder


def run_passes(job: Evaluation, worker: PartWorker, source: str, loaded: LoadedModel, builder: PromptBuilder) -> None:
    """All passes of one model."""

    def forward(row: PackedRow) -> np.ndarray:
        return score_row(loaded.model, row, loaded.model.device)

    for entry in job.passes:
        if entry.source == source:
            folder = job.scores(entry)
            folder.open(job.identity(entry, builder.fingerprint))
            count = worker.run(entry, folder, builder, forward)
            log.info("%s: scored %d of %d parts here", entry.name, count, len(worker.parts))
