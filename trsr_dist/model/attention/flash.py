"""FlashAttention 2 kernels on a GPU: those within PyTorch, or those of the flash-attn package."""

from __future__ import annotations

import torch

from trsr_dist.model.attention.layout import Call


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
