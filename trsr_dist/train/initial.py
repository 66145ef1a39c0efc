"""An adapter of an earlier training to start from: its weights alone, at step 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig

from trsr_dist.bases import ADAPTER_CONFIG
from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.files import sha256_of
from trsr_dist.model.adapters import adapter_file, attach, read_adapter
from trsr_dist.model.fingerprint import check_same_base
from trsr_dist.model.lora import parameter_name
from trsr_dist.model.places import check_checkpoint, follow, is_checkpoint, read_provenance
from trsr_dist.pretrained import BaseSource, load_config, read_structure

OWNED = {"r": "r", "lora_alpha": "alpha", "use_rslora": "use_rslora"}
"""Keys of adapter_config.json that belong to keys of ``lora``."""
UNKNOWN = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")
"""Kinds of adapter that are not trained here."""


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
        raise ModelError(f"train.init_adapter={place}: no {ADAPTER_CONFIG} there; name a PEFT adapter")
    adapter = read_adapter(folder)
    _check_config(folder, adapter.config, lora)
    recorded = provenance.get("base", {}).get("fingerprint", "")
    check_same_base(base.name_or_path, fingerprint, recorded, f"name the base of {folder} with model.name_or_path")
    attach(read_structure(base, load_config(base)).model, adapter)
    weights = {parameter_name(name): tensor for name, tensor in adapter.tensors.items()}
    return InitialAdapter(folder, weights, sha256_of(adapter_file(folder)))


def _check_config(folder: Path, config: PeftConfig, lora: dict[str, Any]) -> None:
    path = folder / ADAPTER_CONFIG
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{path}: peft_type={config.peft_type.value!r}, expected 'LORA'")
    for key in UNKNOWN:
        if getattr(config, key):
            raise ModelError(f"{path}: {key}={getattr(config, key)!r} is not trained here; merge it into a base first")
    for key, own in OWNED.items():
        if getattr(config, key) != lora[own]:
            raise ConfigError(f"{path}: {key}={getattr(config, key)}, lora.{own}={lora[own]}; set the latter so")
