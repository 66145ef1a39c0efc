"""Decoder layers as compiled code (regional compilation): one piece of code for all layers and all lengths of rows."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch._dynamo.utils import counters

from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.log import get_logger
from trsr_dist.model.inputs import RowInputs
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow, pack_row

COMPILABLE = ("flash_attn", "flash_attn_4", "torch", "cpu")
"""Back ends of the attention that are one operator for the compiler."""

log = get_logger("model")


def check_compilable(backend: str | None, quantization: str, zero_stage: int, kernels: str) -> None:
    """Refuse what ``model.compile=true`` cannot serve.

    Raises:
        ConfigError: says why.
    """
    reason = ""
    if zero_stage == 3:
        reason = "ZeRO stage 3 gathers weights within a layer; take ds_configs/zero1.json or zero2.json"
    elif quantization != "none":
        reason = f"model.quantization={quantization} was not tested with it; set model.quantization=none"
    elif kernels == "liger":
        reason = "compiled layers have no need of model.kernels=liger; set model.kernels=auto"
    elif backend not in COMPILABLE:
        reason = f"it needs shared prefixes with model.attention in {', '.join(COMPILABLE)}, here it is {backend}"
    if reason:
        raise ConfigError(f"model.compile=true: {reason}, or set model.compile=false")


def compile_layers(model: nn.Module, compiler: str = "inductor") -> None:
    """Compile the decoder layers when they run first, for rows of any length.

    Args:
        model: a ``Recommender`` with shared prefixes.
        compiler: of PyTorch's (``torch.compiler.list_backends``).
    """
    for layer in model.causal.model.layers:
        layer.compile(dynamic=True, backend=compiler)


def warm_up(model: nn.Module, answers_only: bool) -> None:
    """Run a short row forward and backward, where there is something to train, and forward alone: all code is compiled
    before the first step, in which a rank that compiles for minutes would be taken for one that hangs.

    Args:
        model: a ``Recommender`` with compiled layers; its parameters have no gradients so far.
        answers_only: whether the training's last layer runs at the answers alone.

    Raises:
        ModelError: the layers cannot be compiled here.
    """
    started, breaks = time.monotonic(), counters["graph_break"].total()
    inputs = RowInputs(_warm_up_row(), model.device)
    was_training = model.training
    try:
        if any(parameter.requires_grad for parameter in model.parameters()):
            model.train().states(inputs, answers_only).float().square().mean().backward()
        with torch.no_grad():
            model.eval().states(inputs, answers_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).splitlines()[:3])
        raise ModelError(
            f"model.compile=true: the layers cannot be compiled here ({type(error).__name__}: {reason}); "
            "set model.compile=false"
        ) from error
    model.train(was_training).zero_grad(set_to_none=True)
    log.info("layers compiled in %.0f s", time.monotonic() - started)
    if counters["graph_break"].total() > breaks:
        log.warning("the compiled layers have gaps that run uncompiled: TORCH_LOGS=graph_breaks names them")


def _warm_up_row() -> PackedRow:
    """All its lengths differ: equal ones are taken for the same, and a row where they differ is compiled again."""
    first = TokenizedUser("a", tuple(range(61)), ((1,) * 7, (2,) * 5, (3,) * 3), (1, 0, 0), ("a", "b", "c"))
    second = TokenizedUser("b", tuple(range(1, 41)), ((1,) * 4,), (1,), ("a",))
    return pack_row([first, second])
