"""LoRA layers in a base model, through PEFT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from trsr_dist.errors import ConfigError

PREFIX = "base_model.model."
ADAPTER = "default"


def add_lora(
    model: nn.Module,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Iterable[str] | str,
    use_rslora: bool,
    seed: int,
    init: str = "kaiming",
) -> LoraConfig:
    """Put LoRA layers (arXiv 2106.09685) into ``model``; only they are trainable then.

    Args:
        model: a causal language model, changed in place.
        r: rank.
        alpha: the update is ``alpha / r * BA``.
        dropout: on the adapter's input while training.
        target_modules: names of linear modules, or ``all-linear``.
        use_rslora: scale by ``alpha / sqrt(r)``.
        seed: of A's initial values, equal on all ranks.
        init: kaiming or gaussian, A's distribution.

    Raises:
        ConfigError: a target is not in the model.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    check_targets(model, targets)
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
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        is_lora = "lora_" in name
        parameter.requires_grad_(is_lora)
        if is_lora:  # PEFT makes them in float32 where it cannot see a weight, under ZeRO-3
            parameter.data = parameter.data.to(dtype)
    return config


def check_targets(model: nn.Module, targets: list[str] | str) -> None:
    """Every target must be the name of a linear module.

    Raises:
        ConfigError: names the first that is not, and what there is.
    """
    if isinstance(targets, str):
        return
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
