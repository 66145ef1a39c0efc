"""What must hold before anything is scored or removed: model, base, histories and shards belong together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trsr_dist.bases import BaseName
from trsr_dist.distributed import device_of, on_rank_zero
from trsr_dist.environment import detect_ranks
from trsr_dist.errors import DataError, ModelError, RunError
from trsr_dist.evaluate.evaluation import Evaluation, check_draws
from trsr_dist.evaluate.passes import ALWAYS
from trsr_dist.model.loading import find_base, resolve_precision
from trsr_dist.run import MANIFEST, manifest_hash, read_manifest
from trsr_dist.shards.reader import ShardSet


def complete(job: Evaluation, force: bool) -> Evaluation:
    """The evaluation with base and precision, its inputs checked against each other. All ranks call it.

    Raises:
        ModelError: model or base is not there, or the base is another one than in training.
        RunError: the shards were made from other histories.
        ConfigError: the candidate lists are other ones than the config says.
        DataError: the split has no users.
    """
    check_place(job.model)
    precision = on_rank_zero(lambda: _check(job, force))
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
    is_path = path.is_absolute() or name.startswith(".") or len(path.parts) > 2
    is_beside = len(path.parts) == 2 and path.parent.is_dir()
    if (is_path or is_beside) and not path.is_dir():
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
    return resolve_precision(asked, device_of(detect_ranks()))
