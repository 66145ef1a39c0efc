"""Where a training starts: at its newest checkpoint, which all ranks read, or from an earlier training's adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig

from trsr_dist.bases import ADAPTER_CONFIG, adapter_file
from trsr_dist.config import Config
from trsr_dist.config.kinds import OnResume, marked_settings
from trsr_dist.distributed import gather_objects, on_rank_zero
from trsr_dist.environment import detect_ranks
from trsr_dist.errors import CheckpointError, ConfigError, ModelError, RunError, TrsrError
from trsr_dist.files import sha256_of
from trsr_dist.log import get_logger
from trsr_dist.model.adapters import attach, parameter_name, read_adapter
from trsr_dist.model.artifacts import (
    check_checkpoint,
    check_same_base,
    follow,
    is_checkpoint,
    read_provenance,
)
from trsr_dist.pretrained import BaseSource, load_config, read_structure
from trsr_dist.train.checkpoints import Checkpoint, CheckpointFolder, read_checkpoint

OWNED = {"r": "r", "lora_alpha": "alpha", "use_rslora": "use_rslora"}
"""Keys of adapter_config.json that belong to keys of ``lora``."""
UNKNOWN = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")
"""Kinds of adapter that are not trained here."""

T = TypeVar("T")
log = get_logger("train")


def newest_for_all(checkpoints: CheckpointFolder) -> Checkpoint | None:
    """The newest whole checkpoint: rank 0 chooses it, all ranks read that one. All ranks call it.

    Raises:
        CheckpointError: a rank cannot read it, or finds another one in its place; all ranks raise it.
    """

    def choose() -> Any:
        newest = checkpoints.newest()
        return None if newest is None else newest.folder

    folder = on_rank_zero(choose)
    if folder is None:
        return None
    return read_by_all(
        lambda: read_checkpoint(folder),
        lambda found: f"step {found.state.step}, manifest {found.digest}",
        f"{folder}, which rank 0 has chosen",
        "run.dir must lie on storage that all nodes share",
        CheckpointError,
    )


def read_by_all(read: Callable[[], T], content: Callable[[T], str], what: str, remedy: str, kind: type[TrsrError]) -> T:
    """What every rank reads for itself, where all must find the same. All ranks call it.

    Args:
        read: on this rank.
        content: tells by a few words whether two ranks have found the same.
        what: is read.
        remedy: where ranks find different ones.
        kind: of the error.

    Raises:
        TrsrError: of this kind: a rank cannot read it, or finds another one than rank 0; all ranks raise it.
    """
    found, error = None, ""
    try:
        found = read()
    except (TrsrError, OSError) as problem:
        error = str(problem)
    everywhere = gather_objects((detect_ranks().host, error, "" if error else content(found)))
    for rank, (host, error, told) in enumerate(everywhere):
        if error:
            raise kind(f"rank {rank} on {host} cannot read {what}: {error}")
        if told != everywhere[0][2]:
            first, _, expected = everywhere[0]
            raise kind(f"{what}: rank {rank} on {host} finds {told}, rank 0 on {first} {expected}; {remedy}")
    return found


def resume_settings(config: Config, decided: dict[str, Any]) -> tuple[dict[str, Any], dict[str, OnResume]]:
    """What the losses depend on beside data and model: values to record, and what a change of each means.

    Args:
        config: of the run.
        decided: values that stand in no config (``Prepared.decided``).
    """
    settings: dict[str, Any] = {}
    marks: dict[str, OnResume] = {}
    for name, section in (("train", config.train), ("model", config.model), ("lora", config.lora)):
        values = section.model_dump(mode="json")
        found = {f"{name}.{key}": mark for key, mark in marked_settings(section).items()}
        settings |= {key: values[key.partition(".")[2]] for key in found}
        marks |= found
    settings |= decided
    if isinstance(settings["lora.target_modules"], list):
        settings["lora.target_modules"].sort()  # the order says nothing
    return settings, marks


def check_base(checkpoint: Checkpoint, name: str, fingerprint: str) -> None:
    """The base must be the one that the checkpoint was trained on.

    Raises:
        CheckpointError: names both.
    """
    recorded = checkpoint.provenance.get("base", {})
    if recorded.get("fingerprint", fingerprint) != fingerprint:
        raise CheckpointError(
            f"{checkpoint.folder}: trained on base {recorded.get('name_or_path')!r} with fingerprint "
            f"{recorded['fingerprint'][:12]}..., model.name_or_path={name!r} has {fingerprint[:12]}...; name or "
            "restore that base, use another run.dir, or --force to train from the start"
        )


def check_settings(checkpoint: Checkpoint, settings: dict[str, Any], marks: dict[str, OnResume]) -> None:
    """Say what has changed since the checkpoint was made.

    Args:
        checkpoint: to go on from.
        settings: of this run.
        marks: of the settings that have one.

    Raises:
        CheckpointError: a setting that must not change.
    """
    for key, before, now in _changes(checkpoint, settings):
        if marks.get(key) is OnResume.REFUSED:
            raise CheckpointError(
                f"{checkpoint.folder}: made with {key}={before!r}, now {now!r}, which its weights do not fit; go on "
                "with the former, use another run.dir, or --force to train from the start"
            )
        log.info("%s was %r up to step %d, now it is %r", key, before, checkpoint.state.step, now)


def check_finished(checkpoint: Checkpoint, settings: dict[str, Any], patience: int, leave_out: str = "") -> None:
    """A finished training that is left alone must be the one that was asked for.

    Args:
        checkpoint: its last one.
        settings: of this run.
        patience: ``train.early_stopping_patience``.
        leave_out: a setting that nobody asked for.

    Raises:
        RunError: names the first setting that differs.
    """
    more = "a larger train.max_steps or train.num_epochs"
    if checkpoint.state.has_lost_patience(patience):  # more steps would not make it go on
        more = "a larger train.early_stopping_patience (0: never stop early)"
    for key, before, now in _changes(checkpoint, {key: now for key, now in settings.items() if key != leave_out}):
        raise RunError(
            f"{checkpoint.folder}: this finished training was made with {key}={before!r}, now {now!r}; use another "
            f"run.dir, --force to train from the start, or {more} to go on"
        )


def _changes(checkpoint: Checkpoint, settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    recorded = checkpoint.state.settings or {}
    return [(key, recorded[key], now) for key, now in settings.items() if recorded.get(key, now) != now]


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    """What a training starts from."""

    folder: Path
    weights: dict[str, torch.Tensor]
    """By their names in the causal language model with LoRA layers; float32."""
    digest: str
    """SHA-256 of the weights' file."""


def read_initial(place: str, lora: dict[str, Any], base: BaseSource, fingerprint: str) -> InitialAdapter:
    """Read a PEFT adapter, a checkpoint or a pointer to one.

    Args:
        place: path.
        lora: the run's ``lora`` section.
        base: the run's, in a local folder.
        fingerprint: of it.

    Raises:
        CheckpointError: a checkpoint is damaged, or tensors are not finite or were never trained.
        ConfigError: ``lora`` does not describe this adapter.
        ModelError: it cannot be read, does not fit the base, is of another kind, or was trained on another base.
    """
    folder = follow(Path(place))
    provenance = read_provenance(folder)
    if is_checkpoint(folder):
        check_checkpoint(folder)
        folder = folder / "adapter"
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"train.init_adapter={place}: no {ADAPTER_CONFIG} there; name the folder of a PEFT adapter")
    adapter = read_adapter(folder)
    path, config = folder / ADAPTER_CONFIG, adapter.config
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{path}: peft_type={config.peft_type.value!r}, expected 'LORA'")
    for key in UNKNOWN:
        if getattr(config, key):
            raise ModelError(f"{path}: {key}={getattr(config, key)!r} is not trained here; merge it into a base first")
    for name in adapter.tensors:
        if ".lora_" not in name:  # PEFT adds a copy of an embedding or output head that has LoRA layers
            raise ModelError(
                f"{folder}: holds {name} beside the LoRA layers, which is not trained here; save the adapter with "
                "save_pretrained(..., save_embedding_layers=False), or merge it into a base first"
            )
    for key, own in OWNED.items():
        if getattr(config, key) != lora[own]:
            raise ConfigError(f"{path}: {key}={getattr(config, key)}, lora.{own}={lora[own]}; set the latter so")
    recorded = provenance.get("base", {}).get("fingerprint", "")
    check_same_base(base.name_or_path, fingerprint, recorded, f"name the base of {folder} with model.name_or_path")
    attach(read_structure(base, load_config(base)).model, adapter)
    weights = {parameter_name(name): tensor for name, tensor in adapter.tensors.items()}
    return InitialAdapter(folder, weights, sha256_of(adapter_file(folder)))
