"""What a path given by the user stands for, and the adapter and provenance it leads to."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch.serialization import safe_globals

from trsr_dist.bases import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, CONFIG, BaseName
from trsr_dist.environment import restricted_pickles
from trsr_dist.errors import CheckpointError, ModelError
from trsr_dist.merge.changes import check_mergeable
from trsr_dist.model.adapters import Adapter, make_adapter, read_adapter, read_adapter_config
from trsr_dist.model.artifacts import check_checkpoint, follow, is_checkpoint, read_provenance, run_of
from trsr_dist.weights import PICKLE_ERRORS, pickle_fault

WEIGHTS = (ADAPTER_WEIGHTS, ADAPTER_PICKLE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
NAMED_PART = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(?=\.|$)")
SAVED_MODULE = re.compile(r"\.modules_to_save\.([^.]+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be merged."""

    kind: Literal["checkpoint", "adapter", "engine", "merged"]
    folder: Path
    provenance: dict[str, Any]
    """Of the checkpoint; empty for an adapter from elsewhere."""
    read: Callable[[], Adapter] | None
    """Reads and checks the adapter; None for a merged folder."""
    run: Path | None = None
    """The run folder around the checkpoint."""

    @property
    def tokenizer(self) -> Path | None:
        """The adapter folder, where it brings its own tokenizer."""
        return self.folder if any((self.folder / name).is_file() for name in TOKENIZER_FILES) else None


def find_source(path: Path) -> Source:
    """Resolve a run folder, a checkpoint folder or a pointer to one, an adapter or an engine checkpoint.

    Raises:
        CheckpointError: nothing that can be merged is there, or the checkpoint is incomplete.
    """
    folder = follow(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a checkpoint, a run, or a PEFT adapter folder")
    if is_checkpoint(folder):
        check_checkpoint(folder)
        return Source("checkpoint", folder, read_provenance(folder), lambda: _read(folder / "adapter"), run_of(folder))
    if (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS):
        return Source("adapter", folder, read_provenance(folder), lambda: _read(folder))
    engine = find_engine_folder(folder)
    if engine is not None:
        return Source("engine", engine, read_provenance(folder), lambda: read_engine_adapter(engine))
    if (folder / CONFIG).is_file():
        if "merge" in read_provenance(folder):
            return Source("merged", folder, read_provenance(folder), None)
        raise CheckpointError(f"{folder}: a plain model folder without an adapter; there is nothing to merge")
    raise CheckpointError(
        f"{folder}: neither a checkpoint (adapter/{ADAPTER_CONFIG}), nor a PEFT adapter ({ADAPTER_CONFIG}), nor a "
        "DeepSpeed checkpoint"
    )


def _read(folder: Path) -> Adapter:
    path = folder / ADAPTER_CONFIG
    check_mergeable(path, read_adapter_config(path))
    return read_adapter(folder)


def base_of(source: Source, adapter: Adapter, override: str | None) -> BaseName:
    """The base that ``--base``, the provenance or the adapter's config names, in this order.

    Raises:
        ModelError: none does.
    """
    recorded = source.provenance.get("base", {})
    fingerprint = recorded.get("fingerprint") or ""
    if override:
        return BaseName(override, "", fingerprint)
    name = recorded.get("name_or_path") or adapter.config.base_model_name_or_path
    if not name:
        raise ModelError(f"{source.folder}: names no base model; name it with --base")
    return BaseName(name, recorded.get("revision") or adapter.config.revision or "", fingerprint)


def find_engine_folder(folder: Path) -> Path | None:
    """The folder of one step: ``folder`` itself, or the one that its ``latest`` names."""
    if (folder / "latest").is_file():
        folder = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    return folder if any(folder.glob("*_model_states.pt")) else None


def read_engine_adapter(folder: Path) -> Adapter:
    """LoRA tensors out of DeepSpeed's own checkpoint folder, any ZeRO stage and world size.

    Its files are pickles. They are read with PyTorch's restricted loader, which runs no code of theirs. Tensors of the
    frozen base are not needed.

    Raises:
        CheckpointError: adapter_config.json is neither in the folder nor above it, or a rank's file is missing.
    """
    config = next((path for path in (folder / ADAPTER_CONFIG, folder.parent / ADAPTER_CONFIG) if path.is_file()), None)
    if config is None:
        raise CheckpointError(
            f"{folder}: a DeepSpeed checkpoint does not record the LoRA settings; put the training's "
            f"{ADAPTER_CONFIG} into it or into {folder.parent}"
        )
    settings = read_adapter_config(config)
    check_mergeable(config, settings)
    tensors = _zero_tensors(folder) if any(folder.glob("*_optim_states.pt")) else _plain_tensors(folder)
    named = {
        peft_name(name): tensor for name, tensor in tensors.items() if ".lora_" in name or ".modules_to_save." in name
    }
    if not named:
        raise CheckpointError(f"{folder}: no LoRA tensors in this DeepSpeed checkpoint; is it of another training?")
    return make_adapter(folder, settings, named)


def _zero_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    kept = safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
    try:
        with redirect_stdout(StringIO()), kept, restricted_pickles():  # DeepSpeed prints its progress
            return get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name, exclude_frozen_parameters=True
            )
    except PICKLE_ERRORS as error:
        raise CheckpointError(
            f"{folder}: DeepSpeed cannot gather the ranks' parts ({pickle_fault(error)}); a rank's file is missing or "
            "damaged"
        ) from None


def _plain_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """ZeRO stage 0: rank 0 holds every tensor."""
    path = folder / "mp_rank_00_model_states.pt"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {path.name}; the checkpoint is incomplete")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["module"]
    except PICKLE_ERRORS as error:
        raise CheckpointError(f"{path}: damaged or truncated ({pickle_fault(error)}); choose an earlier step") from None


def peft_name(name: str) -> str:
    """The name PEFT saves: without the adapter's own name."""
    name = SAVED_MODULE.sub("", name.removeprefix("module."))
    return NAMED_PART.sub(r".\1", name)
