"""Liger-Kernel's fused norms, gated MLPs and rotary positions (arXiv 2410.10989), in one model.

Liger's own patches, which transformers calls, also replace classes and functions of the architecture's module, and so
change every model of it in the process. Here each layer of the given model is bound to the kernels, and nothing else.
"""

from __future__ import annotations

import importlib
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from trsr_dist.environment import interprets_triton
from trsr_dist.errors import ConfigError

ROTARY = "apply_rotary_pos_emb"
FUSED = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` whose norms, MLPs and rotary positions are those of the kernels."""


def choose_kernels(name: str, device: torch.device, config: PretrainedConfig) -> bool:
    """Whether a model is to run on fused kernels.

    Args:
        name: ``model.kernels``.
        device: that the model runs on.
        config: of the model.

    Raises:
        ConfigError: they are asked for and cannot run here.
    """
    if name == "none" or (name == "auto" and device.type != "cuda"):
        return False
    reason = _why_not(device, config)
    if reason and name != "auto":
        raise ConfigError(f"model.kernels={name}: {reason}; model.kernels=auto goes without them where they cannot run")
    return not reason


def use_kernels(model: nn.Module) -> list[nn.Module]:
    """Bind a model's layers to the kernels; results stay equal up to rounding.

    Args:
        model: a decoder of one of the ``FUSED`` kinds, with LoRA layers in it or not; changed in place.

    Returns:
        The bound modules: without their attribute ``forward`` they are as before.
    """
    bound = []
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif name.endswith("MLP"):
            module.forward = MethodType(_gated_mlp, module)
        elif name.endswith("Attention") and hasattr(module, "q_proj"):
            module.forward = MethodType(_with_fused_rotary(type(module).forward), module)
        else:
            continue
        bound.append(module)
    return bound


def _norm(norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
    # Not in place: the gradient that it would be written over may belong to others too.
    return _liger("liger_rms_norm")(states, norm.weight, norm.variance_epsilon, in_place=False)


def _gated_mlp(mlp: nn.Module, states: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(_liger("liger_swiglu")(mlp.gate_proj(states), mlp.up_proj(states)))


def _with_fused_rotary(forward: FunctionType) -> FunctionType:
    """The same code, in which one name of its module means Liger's function."""
    names = {**forward.__globals__, ROTARY: _liger("liger_rope")}
    fused = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _liger(name: str) -> Any:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def _why_not(device: torch.device, config: PretrainedConfig) -> str:
    """Why the kernels cannot run, and what to do; empty where they can."""
    if config.model_type not in FUSED or config.hidden_act != "silu":
        return f"architecture {config.model_type!r} has not been proven ({', '.join(FUSED)} with silu have)"
    if device.type != "cuda" and not interprets_triton():
        return "needs a GPU"
    try:
        _liger("liger_rope")
    except Exception as error:  # Triton raises more than ImportError where it does not fit PyTorch or the driver
        return f"the package liger-kernel cannot be used ({error}); pip install 'trsr_dist[liger]'"
    return ""
