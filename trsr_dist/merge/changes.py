"""What a PEFT LoRA adapter does to named tensors of the base."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from trsr_dist.bases import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trsr_dist.errors import ModelError
from trsr_dist.model.adapters import PREFIX, Adapter
from trsr_dist.model.artifacts import write_tensors

PART = re.compile(
    r"^(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<rest>\.weight|\.bias|)$"
)
REFUSED = {
    "layer_replication": "layers used more than once",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts weights)",
    "trainable_token_indices": "trainable tokens",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
SET_BY_FEW = ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "ensure_weight_tying")
"""Further settings that change what is merged; told of where they are set."""


@dataclass(slots=True)
class Change:
    """What happens to one tensor of the base: replaced, then ``+ scale * left @ right``, then DoRA's row norms set."""

    replacement: torch.Tensor | None = None
    """float32, the tensor's shape."""
    left: torch.Tensor | None = None
    """float32, shape (rows, rank)."""
    right: torch.Tensor | None = None
    """float32, shape (rank, columns)."""
    scale: float = 1.0
    magnitude: torch.Tensor | None = None
    """float32, shape (rows,): DoRA (arXiv 2402.09353)."""
    added: torch.Tensor | None = None
    """float32, shape (rows,): added to a bias (lora_bias)."""

    def rows(self, base: torch.Tensor, first: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows of the changed tensor, computed in ``dtype``.

        Args:
            base: shape (rows, columns), any floating dtype: the base's rows from ``first`` on.
        """
        last = first + base.shape[0]
        result = base.to(dtype)
        if self.replacement is not None:
            result = self.replacement.reshape(self.replacement.shape[0], -1)[first:last].to(dtype)
        if self.left is not None and self.right is not None:
            left, right = self.left[first:last].to(dtype), self.right.to(dtype)
            result = torch.addmm(result, left, right, alpha=self.scale)
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(result, dim=1, keepdim=True)
            result = result * (self.magnitude[first:last].to(dtype).unsqueeze(1) / norm)
        if self.added is not None:
            result = result + self.added[first:last].to(dtype).reshape(result.shape) * self.scale
        return result


def check_mergeable(path: Path, config: PeftConfig) -> None:
    """Refuse by name what cannot be merged into plain weights.

    Args:
        path: of adapter_config.json.
        config: its content.

    Raises:
        ModelError: names the method and what to do.
    """
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{path}: peft_type is {config.peft_type.value!r}; only LORA adapters can be merged here")
    for key, meaning in REFUSED.items():
        if getattr(config, key, None):
            raise ModelError(f"{path}: {key} is set ({meaning}); merging it is not supported, serve the adapter itself")
    if config.bias != "none":
        raise ModelError(f"{path}: bias={config.bias!r}; PEFT does not save such biases reliably, only none can merge")


def scale_of(adapter: Adapter, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732), after the module's patterns.

    Raises:
        ModelError: the tensors' rank is not the configured one.
    """
    config = adapter.config
    expected = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    if rank != expected:
        raise ModelError(
            f"{adapter.folder}: {module} has rank {rank}, {ADAPTER_CONFIG} says {expected}; the files do not belong "
            "together"
        )
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def find_changes(adapter: Adapter, transposed: Container[str] = ()) -> dict[str, Change]:
    """Changes by name of the base's tensor.

    Args:
        adapter: of the base.
        transposed: modules whose weight is (in, out). The model tells: PEFT goes by it too, and writes into the one
            setting of an adapter, fan_in_fan_out, what its last module was.

    Raises:
        ModelError: a pair lacks one half, or a tensor belongs to no method known here.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    changes: dict[str, Change] = {}
    for name, tensor in adapter.tensors.items():
        match = PART.match(name)
        if match:
            kind = match["kind"] + (".bias" if match["rest"] == ".bias" else "")
            modules.setdefault(match["module"], {})[kind] = tensor
        elif ".lora_" in name:
            raise ModelError(f"{adapter.folder}: {name} is no LoRA tensor known here; nothing is merged")
        else:
            changes.setdefault(name.replace(".base_layer.", "."), Change()).replacement = tensor
    for module, parts in sorted(modules.items()):
        _add_update(adapter, changes, module, parts, module in transposed)
    return changes


def _add_update(
    adapter: Adapter, changes: dict[str, Change], module: str, parts: dict[str, torch.Tensor], transposed: bool
) -> None:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for half in names:
        if half not in parts:
            raise ModelError(f"{adapter.folder}: {module} has no {half}; the adapter is incomplete, copy it again")
    down, up = parts[names[0]], parts[names[1]]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise ModelError(
            f"{adapter.folder}: {module} has {names[0]} {tuple(down.shape)} and {names[1]} {tuple(up.shape)}; "
            "expected (rank, in) and (out, rank)"
        )
    change = changes.setdefault(f"{module}.weight", Change())
    change.scale = scale_of(adapter, module, down.shape[0])
    transposed = transposed or embedding
    change.left, change.right = (down.T, up.T) if transposed else (up, down)
    magnitude = parts.get("lora_magnitude_vector")
    if (magnitude is not None) != adapter.config.use_dora:
        raise ModelError(f"{adapter.folder}: use_dora={adapter.config.use_dora}, but {module} says otherwise; damaged")
    if magnitude is not None:
        if transposed:
            raise ModelError(f"{adapter.folder}: DoRA on {module}, an embedding or transposed layer, is not supported")
        change.magnitude = magnitude.flatten()
    if "lora_B.bias" in parts:
        bias = changes.setdefault(f"{module}.bias", Change())
        bias.added, bias.scale = parts["lora_B.bias"], change.scale


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """All settings that change what is merged: for the provenance, the model card and the hash."""
    config = adapter.config
    targets = config.target_modules or []
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "modules_to_save": sorted(config.modules_to_save or []),
        **{name: getattr(config, name) for name in SET_BY_FEW if getattr(config, name)},
    }


def adapter_hash(adapter: Adapter) -> str:
    """Changes with the settings and with every value of the tensors."""
    state = hashlib.sha256(json.dumps(adapter_facts(adapter), sort_keys=True).encode())
    for name, tensor in sorted(adapter.tensors.items()):
        state.update(name.encode())
        state.update(tensor.contiguous().view(torch.uint8).numpy())
    return state.hexdigest()


def write_adapter(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write a PEFT adapter folder that ``PeftModel.from_pretrained`` loads."""
    config = replace(adapter.config, base_model_name_or_path=base_name, inference_mode=True)
    config.save_pretrained(str(folder))
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.tensors.items()}
    write_tensors(tensors, folder / ADAPTER_WEIGHTS)
