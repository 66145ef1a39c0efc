"""LoRA through PEFT: new layers for a training, and the one loader of adapters, which compares every name and shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from trsr_dist.bases import ADAPTER_CONFIG, ADAPTER_PICKLE, adapter_file, readable
from trsr_dist.errors import CheckpointError, ConfigError, DataError, ModelError
from trsr_dist.files import read_json
from trsr_dist.weights import PICKLE_ERRORS, pickle_fault

PREFIX = "base_model.model."
ADAPTER = "default"
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA, which acts on a part of each prompt only",
    "megatron_config": "Megatron layers",
}
"""Settings with which the model would not compute what the adapter was trained for."""
REMEDY = "another base, or files that do not belong together: name the base of its training, or copy the adapter again"
SHOWN = 100
"""Characters of a library's reason."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's settings and its float32 tensors, under PEFT's names without ``base_model.model.``."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, torch.Tensor] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT adapter folder and check its values.

    Raises:
        ModelError: its kind is not supported, or its files are damaged.
        CheckpointError: its tensors are empty, not finite, or were never trained.
    """
    path = adapter_file(folder)
    config = read_adapter_config(folder / ADAPTER_CONFIG)
    try:
        with readable(path):
            if path.name == ADAPTER_PICKLE:
                tensors = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
            else:
                tensors = load_file(path)
    except (SafetensorError, *PICKLE_ERRORS) as error:
        raise ModelError(f"{path}: damaged, truncated or no adapter ({pickle_fault(error)}); copy it again") from None
    return make_adapter(folder, config, tensors)


def make_adapter(folder: Path, config: PeftConfig, tensors: Any) -> Adapter:
    """Check tensors under PEFT's names and keep them in float32.

    Raises:
        CheckpointError: a tensor is empty or not finite, or all LoRA B are zero.
        ModelError: these are no tensors.
    """
    pairs = tensors.items() if isinstance(tensors, dict) else [("", None)]
    for name, tensor in pairs:
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ModelError(f"{folder}: {name!r} is no tensor of floating type; restore the adapter's file")
        if tensor.numel() == 0:
            raise CheckpointError(
                f"{folder}: {name} is empty; the adapter was saved under ZeRO-3 without gathering its parts"
            )
        if not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity; choose an earlier checkpoint")
    named = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}
    outputs = [tensor for name, tensor in named.items() if re.search(r"\.lora_(embedding_)?B", name)]
    if not named:
        raise CheckpointError(f"{folder}: the adapter holds no tensors")
    if outputs and len(outputs) * 2 == len(named) and not any(tensor.any() for tensor in outputs):
        raise CheckpointError(
            f"{folder}: every LoRA B is zero, so the fine-tuned model would be the base; choose a trained checkpoint"
        )
    return Adapter(folder, config, named)


def read_adapter_config(path: Path) -> PeftConfig:
    """Read adapter_config.json; what this PEFT does not know, or the model would not be run with, is refused by name.

    Raises:
        ModelError: names the setting and what to do.
    """
    try:
        with readable(path):
            values = read_json(path)
    except DataError as error:
        raise ModelError(str(error)) from None
    kinds = {kind.value: make for kind, make in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ModelError(f"{path}: peft_type is {kind!r}, which this PEFT does not know; restore the file")
    known = kinds[kind].__dataclass_fields__
    unknown = sorted(key for key, value in values.items() if key not in known and value)
    if unknown:
        raise ModelError(f"{path}: unknown settings {unknown}; this PEFT does not know them, update it")
    for key, meaning in UNSUPPORTED.items():
        if values.get(key):
            raise ModelError(f"{path}: {key} is set ({meaning}), which is not supported here")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(values.get(key), str | None):
            raise ModelError(f"{path}: {key} is {str(values[key])[:SHOWN]!r}, expected a text; restore the file")
    start = str(values.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGED_BASE):
        raise ModelError(
            f"{path}: init_lora_weights={start!r} changes the base itself; convert the adapter first (PEFT's "
            "path_initial_model_for_weight_conversion), then set init_lora_weights to true"
        )
    try:
        config = kinds[kind](**{key: value for key, value in values.items() if key in known})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: {error}") from None
    if config.is_prompt_learning:
        raise ModelError(f"{path}: peft_type={kind} writes into the prompt, which is not supported here")
    config.inference_mode = True
    return config


def attach(model: nn.Module, adapter: Adapter) -> PeftModel:
    """Put an adapter's layers into a model, by PEFT: every tensor finds its place, every layer its tensors.

    Args:
        model: changed in place; on the meta device shapes are compared, no values copied.
        adapter: of any kind that PEFT knows.

    Raises:
        ModelError: names what is missing, left over, or of another shape.
    """
    on_meta = next(model.parameters()).is_meta
    tensors = {PREFIX + name: tensor for name, tensor in adapter.tensors.items()}
    try:
        config = deepcopy(adapter.config)  # PEFT writes what it finds in the model into it
        peft = PeftModel(model, config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=on_meta)
        result = set_peft_model_state_dict(peft, tensors, ADAPTER, low_cpu_mem_usage=on_meta)
    except KeyError as error:
        raise ModelError(f"{adapter.folder}: the adapter lacks {str(error.args[0])[:SHOWN]}; {REMEDY}") from None
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"{adapter.folder}: {_reason(error)}; {REMEDY}") from None
    own = PEFT_TYPE_TO_PREFIX_MAPPING.get(adapter.config.peft_type, "")
    missing = [name for name in result.missing_keys if own in name and f".{ADAPTER}" in name]
    for names, what in ((result.unexpected_keys, "has no place in the model"), (missing, "is missing")):
        if names:
            raise ModelError(
                f"{adapter.folder}: {len(names)} tensors do not fit the base: {_shown(names[0])} {what}; {REMEDY}"
            )
    return peft


def _shown(name: str) -> str:
    return name.replace(PREFIX, "").replace(f".{ADAPTER}", "")


def _reason(error: Exception) -> str:
    """The first fault that PyTorch or PEFT names."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if line.startswith("size mismatch")]
    return _shown((named or [line for line in lines if line] or [type(error).__name__])[0])


def add_lora(
    model: nn.Module,
    seed: int,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Iterable[str] | str,
    use_rslora: bool,
    init: str,
) -> LoraConfig:
    """Put LoRA layers (arXiv 2106.09685) into ``model``; only they are trainable then.

    Args:
        model: a causal language model, changed in place.
        seed: of A's initial values, equal on all ranks.
        r: rank.
        alpha: the update is ``alpha / r * BA``.
        dropout: on the adapter's input while training.
        target_modules: names of linear modules, or ``all-linear``.
        use_rslora: scale by ``alpha / sqrt(r)``.
        init: kaiming or gaussian, A's distribution.

    Raises:
        ConfigError: a target is not in the model, or none that could be merged.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    if isinstance(targets, list):
        _check_targets(model, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=use_rslora,
        init_lora_weights=True if init == "kaiming" else init,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, ADAPTER)
    if config.target_parameters:  # PEFT adds those of the experts to all linear modules
        raise ConfigError(
            f"lora.target_modules={target_modules}: of this mixture-of-experts model that is LoRA on bare parameters "
            f"too ({', '.join(sorted(config.target_parameters))}), which cannot be merged; name modules, such as those "
            f"of the attention: {sorted(config.target_modules)}"
        )
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        is_lora = "lora_" in name
        parameter.requires_grad_(is_lora)
        if is_lora:  # PEFT makes them in float32 where it cannot see a weight, under ZeRO-3
            parameter.data = parameter.data.to(dtype)
    return config


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    linears = sorted({name.rpartition(".")[2] for name in names})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(f"lora.target_modules: {target!r} is not in this model; its linear modules: {linears}")


def adapter_name(parameter: str) -> str:
    """PEFT's name, in adapter files, of a parameter of the base model with LoRA layers."""
    return PREFIX + parameter.replace(f".{ADAPTER}.", ".")


def parameter_name(name: str) -> str:
    """Inverse of ``adapter_name`` for LoRA tensors."""
    module, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
    part, dot, rest = kind.partition(".")
    return f"{module}.lora_{part}.{ADAPTER}{dot}{rest}"


def adapter_config(config: LoraConfig, base_name: str, revision: str) -> dict[str, Any]:
    """Content of ``adapter_config.json``."""
    config.base_model_name_or_path = base_name
    config.revision = revision or None
    config.inference_mode = True
    values = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
