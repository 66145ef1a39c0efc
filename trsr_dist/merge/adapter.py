"""A PEFT LoRA adapter as what it does to named tensors of the base."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from trsr_dist.errors import CheckpointError, ModelError
from trsr_dist.files import read_json
from trsr_dist.model.tensor_file import write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PART = re.compile(
    r"^(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<rest>\.weight|\.bias|)$"
)
REFUSED = {
    "layer_replication": "layers used more than once",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts weights)",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "activated LoRA, which acts on a part of each prompt only",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron layers",
}
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's settings and its float32 tensors, under PEFT's names without ``base_model.model.``."""

    folder: Path
    config: LoraConfig
    tensors: dict[str, torch.Tensor] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732), after the module's patterns.

        Raises:
            ModelError: the tensors' rank is not the configured one.
        """
        expected = self.config.rank_pattern.get(get_pattern_key(self.config.rank_pattern.keys(), module), self.config.r)
        alphas = self.config.alpha_pattern
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), self.config.lora_alpha)
        if rank != expected:
            raise ModelError(
                f"{self.folder}: {module} has rank {rank}, {CONFIG} says {expected}; the files do not belong together"
            )
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


def read_adapter(folder: Path) -> Adapter:
    """Read and check a PEFT adapter folder.

    Raises:
        ModelError: the adapter's method cannot be merged, or its files are damaged.
        CheckpointError: its tensors are empty, not finite, or were never trained.
    """
    config = read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if path.is_file():
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ModelError(f"{path}: damaged or truncated ({error}); copy it anew") from None
    elif (folder / "adapter_model.bin").is_file():
        tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    else:
        raise ModelError(f"{folder}: no {WEIGHTS}; the adapter is incomplete, copy it anew")
    return make_adapter(folder, config, tensors)


def make_adapter(folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> Adapter:
    """Check tensors under PEFT's names and keep them in float32.

    Raises:
        CheckpointError: a tensor is empty or not finite, or all LoRA B are zero.
    """
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise CheckpointError(
                f"{folder}: {name} is empty; the adapter was saved under ZeRO-3 without gathering its parts"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity; choose an earlier checkpoint")
    named = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}
    outputs = [tensor for name, tensor in named.items() if re.search(r"\.lora_(embedding_)?B", name)]
    if not outputs and not named:
        raise CheckpointError(f"{folder}: the adapter holds no tensors")
    if outputs and len(outputs) * 2 == len(named) and not any(tensor.any() for tensor in outputs):
        raise CheckpointError(
            f"{folder}: every LoRA B is zero, so the merged model would be the base; choose a trained checkpoint"
        )
    return Adapter(folder, config, named)


def read_config(path: Path) -> LoraConfig:
    """Read adapter_config.json; refuse by name what cannot be merged into plain weights.

    Raises:
        ModelError: names the method and what to do.
    """
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {values.get('peft_type')!r}; only LORA adapters can be merged here")
    for key, meaning in REFUSED.items():
        if values.get(key):
            raise ModelError(f"{path}: {key} is set ({meaning}); merging it is not supported, serve the adapter itself")
    if values.get("bias", "none") != "none":
        raise ModelError(
            f"{path}: bias={values['bias']!r}; PEFT does not save such biases reliably, only none can merge"
        )
    start = str(values.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGED_BASE):
        raise ModelError(
            f"{path}: init_lora_weights={start!r} changes the base itself; convert the adapter first (PEFT's "
            "path_initial_model_for_weight_conversion), then set init_lora_weights to true"
        )
    known = LoraConfig.__dataclass_fields__
    unknown = sorted(key for key, value in values.items() if key not in known and value)
    if unknown:
        raise ModelError(f"{path}: unknown settings {unknown}; this PEFT does not know them, so nothing is merged")
    try:
        return LoraConfig(**{key: value for key, value in values.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None


def find_changes(adapter: Adapter) -> dict[str, Change]:
    """Changes by name of the base's tensor.

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
            _change(changes, name.replace(".base_layer.", ".")).replacement = tensor
    for module, parts in sorted(modules.items()):
        _add_update(adapter, changes, module, parts)
    return changes


def _change(changes: dict[str, Change], name: str) -> Change:
    return changes.setdefault(name, Change())


def _add_update(adapter: Adapter, changes: dict[str, Change], module: str, parts: dict[str, torch.Tensor]) -> None:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for half in names:
        if half not in parts:
            raise ModelError(f"{adapter.folder}: {module} has no {half}; the adapter is incomplete, copy it anew")
    down, up = parts[names[0]], parts[names[1]]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise ModelError(
            f"{adapter.folder}: {module} has {names[0]} {tuple(down.shape)} and {names[1]} {tuple(up.shape)}; "
            "expected (rank, in) and (out, rank)"
        )
    change = _change(changes, f"{module}.weight")
    change.scale = adapter.scale(module, down.shape[0])
    transposed = embedding or adapter.config.fan_in_fan_out
    change.left, change.right = (down.T, up.T) if transposed else (up, down)
    magnitude = parts.get("lora_magnitude_vector")
    if (magnitude is not None) != adapter.config.use_dora:
        raise ModelError(f"{adapter.folder}: use_dora={adapter.config.use_dora}, but {module} says otherwise; damaged")
    if magnitude is not None:
        if transposed:
            raise ModelError(f"{adapter.folder}: DoRA on {module}, an embedding or transposed layer, is not supported")
        change.magnitude = magnitude.flatten()
    if "lora_B.bias" in parts:
        bias = _change(changes, f"{module}.bias")
        bias.added, bias.scale = parts["lora_B.bias"], change.scale


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """What the provenance and the model card say of the adapter."""
    config = adapter.config
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": sorted(config.target_modules) if config.target_modules else [],
        "modules_to_save": sorted(config.modules_to_save or []),
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
    write_tensors(tensors, folder / WEIGHTS)
