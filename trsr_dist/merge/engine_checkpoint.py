"""LoRA tensors out of DeepSpeed's own checkpoint folders, any ZeRO stage and world size.

These files are pickles. They are read with PyTorch's restricted loader, which runs no code of theirs.
"""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch.serialization import safe_globals

from trsr_dist.bases import ADAPTER_CONFIG
from trsr_dist.environment import restricted_pickles
from trsr_dist.errors import CheckpointError
from trsr_dist.merge.adapter import check_mergeable
from trsr_dist.model.adapters import Adapter, make_adapter, read_adapter_config
from trsr_dist.weights import PICKLE_ERRORS, pickle_fault

NAMED_PART = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.([^.]+)(?=\.|$)")
SAVED_MODULE = re.compile(r"\.modules_to_save\.([^.]+)(?=\.)")


def find_engine_folder(folder: Path) -> Path | None:
    """The folder of one step: ``folder`` itself, or the one that its ``latest`` names."""
    if (folder / "latest").is_file():
        folder = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    return folder if any(folder.glob("*_model_states.pt")) else None


def read_engine_adapter(folder: Path) -> Adapter:
    """Gather the trainable tensors of an engine checkpoint; those of the frozen base are not needed.

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
    named = {peft_name(name): tensor for name, tensor in tensors.items() if is_trained(name)}
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


def is_trained(name: str) -> bool:
    """Whether a parameter of a PEFT model belongs to the adapter."""
    return ".lora_" in name or ".modules_to_save." in name


def peft_name(name: str) -> str:
    """The name PEFT saves: without the adapter's own name."""
    name = SAVED_MODULE.sub("", name.removeprefix("module."))
    return NAMED_PART.sub(r".\1", name)
