"""Chooses a back end and makes Hugging Face attention modules call it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from trsr_dist.errors import ConfigError
from trsr_dist.model.attention import cpu, gpu
from trsr_dist.model.attention.cascade import Kernel, register_kernel, tree_attention
from trsr_dist.model.attention.layout import Layout

NAME = "trsr_tree"
"""Under which transformers knows this attention. It has no entry in its registry of masks, so none is built."""
FLASH_DTYPES = (torch.float16, torch.bfloat16)
MAX_FLASH_HEAD = 256
MIN_FLEX_HEAD = 16
PACKAGES = {
    "flash_attn": ("flash-attn", "flash_attn.flash_attn_interface"),
    "flash_attn_4": ("flash-attn-4", "flash_attn.cute.interface"),
}
AUTO = ("flash_attn", "torch", "cpu", "dense")
"""Fastest first. FlexAttention is compiled for minutes, and what is left to the mask are float32 and large heads."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Layout, bool, float], torch.Tensor]
"""From queries (num_queries, num_heads, head_dim), keys and values (num_tokens, num_kv_heads, head_dim), the layout,
whether the queries are the answers' alone, and the scale, to the output (num_queries, num_heads, head_dim)."""


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, refused: Collection[str] = ()
) -> str:
    """``auto`` becomes the fastest of ``AUTO`` that can run here and is not ``refused``; another name is checked.

    Raises:
        ConfigError: the asked back end cannot run here.
    """
    reasons = {choice: _unusable(choice, device, dtype, head_dim) for choice in _BUILDERS}
    if name == "auto":
        return next(choice for choice in AUTO if not reasons[choice] and choice not in refused)
    if reasons[name]:
        usable = ", ".join(choice for choice, reason in reasons.items() if not reason)
        raise ConfigError(f"model.attention={name}: {reasons[name]}; usable here: auto, {usable}")
    return name


@cache
def build_backend(name: str) -> Attend:
    """The function of a back end that ``choose_backend`` gave."""
    return _BUILDERS[name]()


def cascade(kernel: Kernel, copies_head: bool = True) -> Attend:
    """A back end of a flash kernel.

    Args:
        kernel: of the variable-length calls.
        copies_head: whether it takes causal segments with more keys than queries.
    """

    number = register_kernel(kernel, copies_head)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, answers_only: bool, scale: float
    ) -> torch.Tensor:
        return tree_attention(q, k, v, layout.code, number, answers_only, scale)[0]

    return attend


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, answers_only: bool, scale: float
) -> torch.Tensor:
    """Attention with the full mask: quadratic in the row, differentiable by autograd alone; the oracle of the tests.

    Arguments and result as of ``Attend``.
    """
    mask = layout.mask[layout.answer_index] if answers_only else layout.mask
    group = q.shape[1] // k.shape[1]
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)


def register() -> None:
    """Make ``NAME`` known to transformers; models choose it by ``set_attn_implementation``."""
    AttentionInterface.register(NAME, _attention_of_module)


def _attention_of_module(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tree: tuple[Layout, Attend] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer: heads first in, heads last out, batch 1."""
    if tree is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(f"attention {NAME!r} reads packed rows only: pass tree=, no mask, and a batch of one")
    layout, attend = tree
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend(q, k, v, layout, False, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out[None], None


def _unusable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a back end cannot run here; empty where it can."""
    if name in ("flash_attn", "flash_attn_4", "torch"):
        if device.type != "cuda":
            return "needs a GPU"
        if dtype not in FLASH_DTYPES or head_dim > MAX_FLASH_HEAD or head_dim % 8:
            return f"needs 16-bit weights and heads of a multiple of 8 up to {MAX_FLASH_HEAD}, not {dtype}, {head_dim}"
        if name in PACKAGES:
            package, module = PACKAGES[name]
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"the {package} package cannot be used ({error}; pip install {package})"
    if name == "cpu" and not (device.type == "cpu" and cpu.is_available()):
        return "needs the CPU, and a PyTorch with its flash kernel for CPUs"
    if name == "flex" and device.type != "cuda":
        return "FlexAttention has no backward pass on CPUs"
    if name == "flex" and head_dim < MIN_FLEX_HEAD:
        return f"needs heads of {MIN_FLEX_HEAD} or more, not {head_dim}"
    return ""


_BUILDERS: dict[str, Callable[[], Attend]] = {
    "flash_attn": lambda: cascade(gpu.FlashAttnKernel()),
    "flash_attn_4": lambda: cascade(gpu.FlashAttn4Kernel()),
    "torch": lambda: cascade(gpu.TorchFlashKernel()),
    "cpu": lambda: cascade(cpu.CpuKernel(), copies_head=False),
    "flex": lambda: gpu.flex_attention_tree,
    "dense": lambda: dense_attention,
}
