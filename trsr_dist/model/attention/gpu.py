"""Attention on a GPU: FlashAttention 2 of PyTorch or of the flash-attn package, FlashAttention 4, FlexAttention (arXiv
2412.05496)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trsr_dist.model.attention.layout import Call, Layout

BLOCK = 128
RECOMPILE_LIMIT = 64
"""Kernels for training and inference, all queries and answers, short rows and long ones; by default dynamo gives up
after eight and runs the attention unfused."""


class TorchFlashKernel:
    """``cascade.Kernel`` by the FlashAttention 2 that PyTorch's CUDA build holds; float16 and bfloat16."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            call.query_starts,
            call.key_starts,
            call.longest_query,
            call.longest_key,
            0.0,
            call.causal,
            False,
            scale=scale,
        )
        return out, lse

    def backward(
        self, grad: torch.Tensor, tensors: tuple[torch.Tensor, ...], call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse = tensors
        # Without dropout the random state is not read, but the operator wants one.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            call.query_starts,
            call.key_starts,
            call.longest_query,
            call.longest_key,
            0.0,
            call.causal,
            state,
            unused,
            scale=scale,
        )


class FlashAttnKernel:
    """``cascade.Kernel`` by the flash-attn package, version 2.7 or newer."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface

        self._forward = flash_attn_interface._flash_attn_varlen_forward
        self._backward = flash_attn_interface._flash_attn_varlen_backward

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._forward(
            q,
            k,
            v,
            call.query_starts,
            call.key_starts,
            call.longest_query,
            call.longest_key,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=call.causal,
        )
        return out, lse

    def backward(
        self, grad: torch.Tensor, tensors: tuple[torch.Tensor, ...], call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse = tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            call.query_starts,
            call.key_starts,
            call.longest_query,
            call.longest_key,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=call.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return dq, dk, dv


class FlashAttn4Kernel:
    """``cascade.Kernel`` by the flash-attn-4 package (FlashAttention 4 in CuTe; Hopper and newer)."""

    def __init__(self) -> None:
        from flash_attn.cute import interface

        self._forward, self._backward = interface._flash_attn_fwd, interface._flash_attn_bwd

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._forward(q, k, v, **self._options(call, scale), return_lse=True)
        return out, lse

    def backward(
        self, grad: torch.Tensor, tensors: tuple[torch.Tensor, ...], call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse = tensors
        dq, dk, dv, *_ = self._backward(q, k, v, out, grad, lse, **self._options(call, scale))
        return dq, dk, dv

    @staticmethod
    def _options(call: Call, scale: float) -> dict[str, Any]:
        return {
            "cu_seqlens_q": call.query_starts,
            "cu_seqlens_k": call.key_starts,
            "max_seqlen_q": call.longest_query,
            "max_seqlen_k": call.longest_key,
            "softmax_scale": scale,
            "causal": call.causal,
        }


def flex_attention_tree(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, answers_only: bool, scale: float
) -> torch.Tensor:
    """The mask as a compiled block-sparse kernel; arguments and result as of ``backends.Attend``."""
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    options = {"block_mask": block_mask(layout, answers_only), "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if q.is_cuda:
        # The kernel for few queries, which the answers would get, has none for most numbers of them with grouped heads.
        options["kernel_options"] = {"FORCE_USE_FLEX_ATTENTION": True}
    return _kernel(q.is_cuda)(queries, keys, values, **options)[0].transpose(0, 1)


def block_mask(layout: Layout, answers_only: bool) -> BlockMask:
    """The layout's mask in blocks; kept with the layout, for all layers read the same one."""
    kept = layout.__dict__.setdefault("flex_masks", {})
    if answers_only not in kept:
        own, above = layout.segments
        size, device = layout.num_tokens, layout.device
        rows = torch.arange(layout.num_kept, size, device=device)
        rows = rows[layout.answer_index] if answers_only else rows

        def may_read(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            row = rows[query]
            return (key <= row) & ((own[key] == own[row]) | (own[key] == above[row]) | (own[key] == 0))

        mask = create_block_mask(may_read, None, None, len(rows), size, device=device, BLOCK_SIZE=BLOCK)
        kept[answers_only] = mask
    return kept[answers_only]


@cache
def _kernel(compiled: bool):  # noqa: ANN202
    if not compiled:
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # Row lengths change from step to step; without dynamic shapes each would be compiled again.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
