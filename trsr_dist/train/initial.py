"""An adapter of an earlier training to start from: its weights alone, at step 0."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.files import read_json, sha256_of
from trsr_dist.model.lora import parameter_name
from trsr_dist.model.places import ADAPTER_CONFIG, follow, is_checkpoint, read_provenance

WEIGHTS = "adapter_model.safetensors"
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


def read_initial(place: str, lora: dict[str, Any], fingerprint: str) -> InitialAdapter:
    """Read a PEFT adapter, a checkpoint or a pointer to one.

    Args:
        place: path.
        lora: the run's ``lora`` section.
        fingerprint: of the run's base.

    Raises:
        ConfigError: ``lora`` does not describe this adapter.
        ModelError: it cannot be read, is of another kind, or was trained on another base.
    """
    folder = follow(Path(place))
    provenance = read_provenance(folder)
    folder = folder / "adapter" if is_checkpoint(folder) else folder
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ModelError(f"train.init_adapter={place}: no {ADAPTER_CONFIG} and {WEIGHTS} there; name a PEFT adapter")
    _check_config(folder, read_json(folder / ADAPTER_CONFIG), lora)
    if provenance.get("base", {}).get("fingerprint", fingerprint) != fingerprint:
        raise ModelError(f"{folder}: trained on another base than model.name_or_path; name that base")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS}: cannot be read ({error})") from None
    weights = {parameter_name(name): tensor.float() for name, tensor in tensors.items()}
    return InitialAdapter(folder, weights, sha256_of(folder / WEIGHTS))


def _check_config(folder: Path, config: dict[str, Any], lora: dict[str, Any]) -> None:
    path = folder / ADAPTER_CONFIG
    for key in UNKNOWN:
        if config.get(key):
            raise ModelError(f"{path}: {key}={config[key]!r} is not trained here; merge it into a base first")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type={config.get('peft_type')!r}, expected 'LORA'")
    for key, own in OWNED.items():
        if config.get(key, lora[own]) != lora[own]:
            raise ConfigError(f"{path}: {key}={config[key]}, lora.{own}={lora[own]}; set the latter so")
