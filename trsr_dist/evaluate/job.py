"""The evaluation job: score the split's candidates over any number of workers, then reduce and report."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trsr_dist import distributed
from trsr_dist.config import Config
from trsr_dist.config.zero import find_file, read_zero_config
from trsr_dist.data.store import HistoryStore
from trsr_dist.environment import Ranks, array_task, detect_ranks
from trsr_dist.errors import ConfigError, ModelError, RunError
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.passes import PartWorker
from trsr_dist.evaluate.protocols import DrawnLists
from trsr_dist.evaluate.publish import publish
from trsr_dist.evaluate.reduce import Reduction
from trsr_dist.evaluate.split import SplitUsers
from trsr_dist.evaluate.stored import StoredSplit
from trsr_dist.files import writing
from trsr_dist.log import get_logger, setup_logging
from trsr_dist.model.folder import LoadedModel, open_model
from trsr_dist.model.forward import score_row
from trsr_dist.model.places import follow
from trsr_dist.model.zero3 import scoring_config
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.rows import PackedRow
from trsr_dist.run import RunFolder, folder_lock
from trsr_dist.shards.reader import ShardSet

WAIT_SECONDS = 24 * 3600.0
"""A rank that is done waits so long for the others, who score on; the launcher ends all when one dies."""

log = get_logger("evaluate")


def evaluate(config: Config, model: str, *, output: str = "", force: bool = False) -> int:
    """Run the stage; see tools/evaluate.py.

    Args:
        config: of the run.
        model: merged folder, checkpoint or adapter; ``RUN/merged`` and the like stand for folders of the run.
        output: empty: ``RUN/evaluation``.
        force: score anew.

    Raises:
        RunError: the output holds another evaluation.
        ModelError: the model cannot be opened, or has other answers than the config.
        DataError: scores are missing or doubled, or a score is not finite.
    """
    ranks = detect_ranks()
    setup_logging(ranks.rank, "evaluate")
    run = RunFolder(Path(config.run.dir))
    folder = Path(output) if output else run.evaluation
    # A pointer such as checkpoints/best is followed once: it may move while the candidates are scored.
    place = str(follow(Path(run.resolve(model))))
    job = Evaluation(config, run, place, run.resolve(config.model.name_or_path), folder)
    if force and array_task()[1] > 1:
        raise ConfigError("--force in a Slurm array would remove what other tasks write; remove the folder before")
    with writing(folder):
        _evaluate(job, ranks, force)
    return 0


def _evaluate(job: Evaluation, ranks: Ranks, force: bool) -> None:
    with distributed.process_group(ranks, WAIT_SECONDS, always=bool(job.config.evaluate.deepspeed_config)):
        # Rank 0 decides for all: another task of an array may finish between two looks.
        if distributed.on_rank_zero(lambda: job.is_done(force)):
            log.info("%s: already evaluated with these settings; nothing to do (--force redoes it)", job.folder)
            return
        store = HistoryStore(job.run.histories)
        split = StoredSplit(store, job.split)
        users = split_users(job, draw_lists(job, store, split))
        provenance = score_everything(job, users, ranks, force)
    if ranks.is_main:
        reduce_scores(job, Reduction(job, users, split, store), provenance)


def draw_lists(job: Evaluation, store: HistoryStore, split: StoredSplit) -> dict[str, DrawnLists]:
    """The further candidate lists."""
    seed = job.config.run.seed
    return {protocol: DrawnLists(protocol, store, split, **job.draws(), seed=seed) for protocol in job.protocols}


def split_users(job: Evaluation, lists: dict[str, DrawnLists]) -> SplitUsers:
    """The users to rank for."""
    return SplitUsers(ShardSet(job.run.split(job.split)), job.config.evaluate.max_users, job.config.run.seed, lists)


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
        publish(job, reduction.run(provenance))


def make_worker(job: Evaluation, users: SplitUsers, ranks: Ranks) -> PartWorker:
    """This process among all ranks of all array tasks."""
    task, num_tasks = array_task()
    worker, num_workers = task * ranks.world_size + ranks.rank, num_tasks * ranks.world_size
    return PartWorker(users, job.config.evaluate.row_tokens, worker, num_workers)


def score_everything(job: Evaluation, users: SplitUsers, ranks: Ranks, force: bool) -> dict[str, Any]:
    """Score this process's parts of every pass, then wait for the other ranks. Returns the model's provenance."""
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
    """Open a model on this rank's device, or divided over the ranks."""
    device = distributed.device_of(ranks)
    if device.type == "cpu":
        # Matrix products split their sums by threads: one thread gives the same digits for any number of ranks.
        torch.set_num_threads(1)
    return open_model(
        name_or_path,
        revision=job.config.model.revision,
        device=device,
        dtype=getattr(torch, job.precision),
        prompt=job.config.prompt.model_dump(),
        attention=job.config.model.attention,
        trust_remote_code=job.config.model.trust_remote_code,
        zero_config=zero_config(job.config.evaluate.deepspeed_config, job.precision, device),
    )


def zero_config(name: str, precision: str, device: torch.device) -> dict[str, Any] | None:
    """DeepSpeed's config for scoring; None where none is named.

    Raises:
        ConfigError: the file is not of stage 3: the other stages divide nothing that scoring needs.
    """
    if not name:
        return None
    settings = read_zero_config(find_file(name), "evaluate.deepspeed_config")
    stage = settings["zero_optimization"]["stage"]
    if stage != 3:
        raise ConfigError(
            f"evaluate.deepspeed_config={name}: ZeRO stage {stage} divides no weights: nothing is gained; name a "
            "file with stage 3 or leave it empty"
        )
    return scoring_config(settings, precision, device.type == "cuda")


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
    device = next(loaded.model.parameters()).device

    def forward(row: PackedRow) -> np.ndarray:
        return score_row(loaded.model, row, device)

    for entry in job.passes:
        if entry.source == source:
            folder = job.scores(entry)
            folder.open(job.identity(entry, builder.fingerprint))
            if job.config.evaluate.deepspeed_config:
                count = worker.run_together(entry, folder, builder, forward, device)
            else:
                count = worker.run(entry, folder, builder, forward)
            log.info("%s: scored %d of %d parts here", entry.name, count, len(worker.parts))
