"""The scoring part of a job: what must hold before, its models, this process's share of every pass, who may write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trsr_dist import distributed
from trsr_dist.bases import BaseName, is_path
from trsr_dist.config.files import find_file, read_zero_config
from trsr_dist.environment import Ranks, array_share, array_task, detect_ranks
from trsr_dist.errors import ConfigError, DataError, ModelError, RunError
from trsr_dist.evaluate.evaluation import Evaluation, check_draws
from trsr_dist.evaluate.parts import Lockstep, score_samples
from trsr_dist.evaluate.passes import ALWAYS, ScoringPass, assign_parts, split_parts
from trsr_dist.evaluate.score_files import ScoreFolder
from trsr_dist.evaluate.users import SplitUsers
from trsr_dist.hashing import digest
from trsr_dist.locks import Claim, claim
from trsr_dist.log import get_logger, progress
from trsr_dist.model.loading import ModelPrompts, find_base, load_weights, open_prompts, resolve_precision
from trsr_dist.model.recommender import score_row
from trsr_dist.model.zero3 import scoring_config
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.rows import PackedRow, filler_row
from trsr_dist.run import MANIFEST, manifest_hash, read_manifest
from trsr_dist.shards.reader import ShardSet

WAIT_SECONDS = 24 * 3600.0
"""How long a rank that is done waits for the others, which still score; the launcher ends all when one dies."""

log = get_logger("evaluate")


def complete(job: Evaluation, force: bool) -> Evaluation:
    """Rank 0's evaluation with base and precision, its inputs checked against each other. All ranks call it.

    Raises:
        ModelError: model or base is not there, or the base is another one than in training.
        RunError: the shards were made from other histories.
        ConfigError: the candidate lists are other ones than the config says, or tasks of an array are forced.
        DataError: the split has no users.
    """
    if force and array_task()[1] > 1:
        raise ConfigError(
            f"--force in a Slurm array would remove what other tasks write: remove {job.folder} and submit the array "
            "again without it"
        )
    # A run that still trains moves its pointers between two looks.
    model, output = distributed.on_rank_zero(lambda: (job.model, job.output))
    job = replace(job, model=model, output=output)
    check_place(job.model)
    precision = distributed.on_rank_zero(lambda: _check(job, force))
    # Each node may have its own hub cache.
    return replace(job, base=base_of(job), precision=precision)


def _check(job: Evaluation, force: bool) -> str:
    check_histories(job)
    shards = ShardSet(job.run.split(job.split), url=job.config.train.shards_url if job.split == "train" else "")
    if not len(shards):
        raise DataError(f"{shards.folder}: no user to rank for; give data.split a share for {job.split}")
    base_of(job)
    return choose_precision(job, len(shards), force)


def check_place(name: str) -> None:
    """A path must be there; a name with at most one slash may also be a model of the hub.

    Raises:
        ModelError: it is not.
    """
    path = Path(name)
    is_beside = len(path.parts) == 2 and path.parent.is_dir()
    if (is_path(name) or is_beside) and not path.is_dir():
        raise ModelError(f"--model {name}: no such folder; name a merged folder, a checkpoint or an adapter")


def check_histories(job: Evaluation) -> None:
    """The shards must have been made from these histories, and those drawn as the config says.

    Raises:
        RunError, ConfigError: they were not.
    """
    folder, current = job.run.split(job.split), manifest_hash(job.run.histories)
    if not (folder / MANIFEST).is_file():
        raise RunError(f"{folder}: no {MANIFEST}; run launch/summarize.py first")
    recorded = read_manifest(folder).get("inputs", {}).get("histories", current)
    if recorded != current:
        raise RunError(
            f"{folder}: made from the histories {recorded[:12]}..., {job.run.histories} now holds {current[:12]}...; "
            "run launch/summarize.py again"
        )
    check_draws(job)


def base_of(job: Evaluation) -> str:
    """Folder of the model before fine-tuning; empty where it is not ranked."""
    if not job.has_base:
        return ""
    model = job.config.model
    own = BaseName(job.run.resolve(model.name_or_path), model.revision, "")
    remedy = "set model.name_or_path to where it is, or leave base out of evaluate.baselines"
    return str(find_base(job.model, own, job.run.root, remedy))


def choose_precision(job: Evaluation, num_users: int, force: bool) -> str:
    """``train.precision``; auto is what the scores were made with where all of them are there, else by the device."""
    asked, num_users = job.config.train.precision, min(job.config.evaluate.max_users or num_users, num_users)
    if asked == "auto" and not force and not any(job.scores(entry).missing(num_users) for entry in job.passes):
        asked = job.scores(ALWAYS[0]).recorded().get("precision", asked)
    return resolve_precision(asked, distributed.device_of(detect_ranks()))


def open_models(job: Evaluation) -> dict[str, ModelPrompts]:
    """Prompts by the source of the passes; the base reads those of the model.

    Raises:
        ModelError: a tokenizer cannot be read, or the model has other answers than the config.
    """
    model, prompt = job.config.model, job.config.prompt.model_dump()
    found = open_prompts(job.model, prompt, model.trust_remote_code, model.revision)
    if tuple(found.builder.answers) != tuple(job.config.prompt.answers):
        raise ModelError(
            f"{job.model}: trained to answer {tuple(found.builder.answers)}, prompt.answers is "
            f"{tuple(job.config.prompt.answers)}; set prompt.answers to the model's"
        )
    if not job.has_base:
        return {"model": found}
    base = open_prompts(job.base, prompt, model.trust_remote_code)
    return {"model": found, "base": replace(base, builder=PromptBuilder(base.tokenizer, **found.builder.settings))}


class Scorer:
    """This process's share of the passes of one model: weights are read only where there is something to score.

    Args:
        job: the evaluation.
        source: ``model`` or ``base``.
        prompts: of the model.
        users: of the split.
        parts: that this process scores.
        ranks: this process.
    """

    def __init__(
        self,
        job: Evaluation,
        source: str,
        prompts: ModelPrompts,
        users: SplitUsers,
        parts: Sequence[int],
        ranks: Ranks,
    ) -> None:
        self._job = job
        self._passes = [entry for entry in job.passes if entry.source == source]
        self._prompts = prompts
        self._users = users
        self._parts = parts
        self._device = distributed.device_of(ranks)
        self._zero = zero_config(job.config.evaluate.deepspeed_config, job.precision, self._device)
        self._model: nn.Module | None = None

    def load(self, again: bool = False) -> None:
        """Read the weights where parts are missing (of divided weights: on any rank), or all are scored again."""
        has_work = again or any(not self._job.scores(entry).has(part) for entry in self._passes for part in self._parts)
        if self._zero is not None:
            has_work = distributed.sum_over_ranks([float(has_work)], self._device)[0] > 0
        if not has_work:
            return
        if self._device.type == "cpu":
            # Matrix products split their sums by threads: one thread gives the same digits for any number of ranks.
            torch.set_num_threads(1)
        dtype, settings = getattr(torch, self._job.precision), self._job.config.model
        self._model = load_weights(self._prompts, self._device, dtype, settings.attention, self._zero, settings.compile)

    def run(self, folders: dict[str, ScoreFolder]) -> None:
        """Score what is missing of all passes; the weights are given back at the end."""
        parts = split_parts(len(self._users))
        for entry in self._passes:
            count = self._score(self._model, entry, folders[entry.name], parts) if self._model is not None else 0
            log.info("%s: scored %d of %d parts here", entry.name, count, len(parts))
        self._model = None

    def _score(self, model: nn.Module, entry: ScoringPass, folder: ScoreFolder, parts: Sequence[range]) -> int:
        """Score this process's parts of a pass that are not on disk yet; returns how many those were."""
        builder, row_tokens = self._prompts.builder, self._job.config.evaluate.row_tokens

        def forward(row: PackedRow) -> np.ndarray:
            return score_row(model, row, self._device)

        together = Lockstep(forward, filler_row(builder.answer_ids), self._device)
        todo = [part for part in self._parts if not folder.has(part)]
        num_users = sum(len(parts[part]) for part in todo)
        with progress(total=num_users, description=f"score {entry.name}", unit="user") as bar:
            for part in todo:
                samples = [self._users.sample(index, entry.change, entry.protocol) for index in parts[part]]
                score = forward if self._zero is None else together
                folder.write(part, score_samples(samples, builder, score, row_tokens, bar.update))
        if self._zero is not None:
            together.finish()
        return len(todo)


def zero_config(name: str, precision: str, device: torch.device) -> dict | None:
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


def claim_folder(job: Evaluation) -> Any:
    """Keeps jobs of other settings out; a context manager."""
    what = job.settings() | job.inputs()
    return claim(job.folder, digest(what), what)


def parts_of_worker(users: SplitUsers, ranks: Ranks) -> list[int]:
    """Those of this process among all ranks of all array tasks, shared out by cost."""
    task, num_tasks = array_share()
    costs = [users.cost(part) for part in split_parts(len(users))]
    return assign_parts(costs, num_tasks * ranks.world_size)[task * ranks.world_size + ranks.rank]


def score_everything(
    job: Evaluation, users: SplitUsers, models: dict[str, ModelPrompts], ranks: Ranks, clear: Callable[[], None] | None
) -> dict[str, ScoreFolder]:
    """Score this process's parts of every pass, then wait for the other ranks.

    Args:
        job: the evaluation.
        users: of the split.
        models: by source.
        ranks: this process.
        clear: removes what lies there, where it is to be scored again; rank 0 calls it once all ranks have the model.

    Returns:
        The folders of the passes, opened.
    """
    parts = parts_of_worker(users, ranks)
    scorers = [Scorer(job, source, prompts, users, parts, ranks) for source, prompts in models.items()]
    scorers[0].load(again=clear is not None)
    if clear is not None:
        distributed.barrier()
        distributed.on_rank_zero(clear)
    folders = {}
    for entry in job.passes:
        folders[entry.name] = job.scores(entry)
        identity = job.identity(entry, models[entry.source].builder.fingerprint)
        folders[entry.name].open(identity, len(users), job.base if entry.source == "base" else job.model)
    scorers[0].run(folders)
    for scorer in scorers[1:]:
        scorer.load()
        scorer.run(folders)
    distributed.barrier()
    return folders


def clear_folder(job: Evaluation, entry: Claim) -> None:
    """Remove what an earlier evaluation wrote.

    Raises:
        RunError: another job is at work there.
    """
    entry.check_alone()
    job.clear()
