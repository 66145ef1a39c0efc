"""A frozen base whose products run in FP8: weights in e4m3 with a scale a row, activations scaled row by row.

Micikevicius et al., FP8 formats for deep learning (arXiv 2209.05433). Only the input of a frozen layer has a gradient,
so there are two products: the forward one, and that of the output's gradient with the weights. There the weights'
scales lie along the sum; they are multiplied into the gradient before it is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trsr_dist.errors import ConfigError

CODES = torch.float8_e4m3fn
"""Of the gradients too: a row has its own scale, so that e5m2's range is not needed, while its rounding, to a bit less,
made a relative error of 5.0% of the gradient's product in place of 2.6% (normal numbers, CPU)."""
LARGEST = torch.finfo(CODES).max
LEAST = 1e-30
"""Rows of smaller numbers are not scaled up further."""
MULTIPLE = 16
"""The products of the hardware want widths that are multiples of it."""


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Try a product.

    Raises:
        ConfigError: this device or dtype has none with a scale a row.
    """
    remedy = "take model.quantization=8bit or none"
    if device.type == "cuda" and dtype != torch.bfloat16:
        raise ConfigError(f"model.quantization=fp8: its products give bfloat16 on GPUs, not {dtype}; {remedy}")
    try:
        layer = Fp8Linear(nn.Linear(MULTIPLE, MULTIPLE, bias=False).to(device, dtype))
        with torch.enable_grad():
            layer(torch.ones(1, MULTIPLE, device=device, dtype=dtype, requires_grad=True)).sum().backward()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.quantization=fp8: no FP8 products on this device ({reason}), which GPUs have from compute "
            f"capability 8.9 on; {remedy}"
        ) from None


def hold_in_fp8(model: nn.Module, device: torch.device) -> None:
    """Replace the linear layers below a causal model's head, whose widths allow it, by ``Fp8Linear`` on ``device``.

    Raises:
        ConfigError: there are none.
    """
    decoder, found = model.base_model, 0
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.Linear and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE):
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, Fp8Linear(module.to(device)))
            found += 1
    if not found:
        raise ConfigError("model.quantization=fp8: this model has no linear layers that it could hold; take none")


class Fp8Linear(nn.Linear):
    """A frozen linear layer, to which PEFT adds as to any other.

    Codes and scales are kept as whole numbers: DeepSpeed turns all floating tensors of a model into its dtype.

    Args:
        linear: the layer that it stands for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scales = scaled_weight(linear.weight.detach())
        self.weight = nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scales", scales.view(torch.int32))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in the dtype of ``states``."""
        out = _Product.apply(states.flatten(0, -2), self.weight.view(CODES), self.scales.view(torch.float32))
        out = out.view(*states.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def dequantized(self) -> torch.Tensor:
        """The weights that it computes with, float32."""
        return self.weight.view(CODES).float() * self.scales.view(torch.float32)


def scaled_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and float32 scales of shape (out_features, 1), which bfloat16 holds too: they multiply gradients."""
    weight = weight.float()
    scales = (weight.abs().amax(1, keepdim=True).clamp(min=LEAST) / LARGEST).bfloat16().float()
    return (weight / scales).to(CODES), scales


def scaled_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of (rows, width), and float32 scales (rows, 1). The factor is rounded to x's dtype before its reciprocal is
    taken, so that no float32 copy of ``x`` is made and the scale is still exact."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True)
    factor = (LARGEST / largest.clamp(min=LEAST)).to(x.dtype)
    return (x * factor).to(CODES).contiguous(), factor.float().reciprocal()


class _Product(torch.autograd.Function):
    """states @ (codes * scales).T of (tokens, in), (out, in) and (out, 1)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        return _multiply(states, codes.t(), scales.t(), is_fast=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        scaled = grad * scales.t().to(grad.dtype)
        # The hardware reads the second factor column by column: a copy, since a second set of weights would cost more.
        columns = codes.t().contiguous().t()
        ones = torch.ones(1, codes.shape[1], device=codes.device)
        return _multiply(scaled, columns, ones, is_fast=False), None, None


def _multiply(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, is_fast: bool) -> torch.Tensor:
    """``is_fast``: sums stay in the tensor cores' registers, whose precision is lower; enough for activations."""
    rows, row_scales = scaled_rows(x)
    return torch._scaled_mm(rows, codes, row_scales, scales, out_dtype=x.dtype, use_fast_accum=is_fast)
