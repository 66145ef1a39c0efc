"""Attention over the tree of a packed row as a few calls of a flash kernel, merged exactly.

Each call gives an output and its log-sum-exp; the outputs are weighted together. The backward pass hands the *merged*
output and log-sum-exp to every call's backward kernel: with p = exp(s - lse_total) and D = rowsum(dout * out_total)
each of them is exactly its share of the gradient, as in ring attention (arXiv 2310.01889). Letting autograd pass
through the merge instead is wrong with FlashAttention 2, which drops the gradient of the log-sum-exp.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from trsr_dist.model.attention.layout import Call, Layout


class Kernel(Protocol):
    """A flash attention with variable lengths, forward and backward.

    Shapes: queries (num_queries, num_heads, head_dim), keys and values (num_keys, num_kv_heads, head_dim), log-sum-exp
    float32 (num_heads, num_queries).
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""

    def backward(
        self, grad: torch.Tensor, tensors: tuple[torch.Tensor, ...], call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of (q, k, v) from those of the output; ``tensors`` are q, k, v, output and log-sum-exp."""


class Cascade(torch.autograd.Function):
    """The merged calls as one differentiable operation."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        calls: tuple[Call, ...],
        kernel: Kernel,
        scale: float,
    ) -> torch.Tensor:
        """Output of shape (num_queries, num_heads, head_dim). The first call covers all queries."""
        out, lse = kernel.forward(q, k[calls[0].keys], v[calls[0].keys], calls[0], scale)
        for call in calls[1:]:
            part, part_lse = kernel.forward(q[call.queries], k[call.keys], v[call.keys], call, scale)
            merge_into(out[call.queries], lse[:, call.queries], part, part_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = calls, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        calls, kernel, scale = ctx.how
        grad = grad.contiguous()
        totals: tuple[torch.Tensor, ...] = ()
        for call in calls:
            rows, columns = call.queries, call.keys
            tensors = (q[rows], k[columns], v[columns], out[rows], lse[:, rows].contiguous())
            parts = kernel.backward(grad[rows], tensors, call, scale)
            if not totals and len(parts[0]) == len(q) and len(parts[1]) == len(k):
                totals = parts  # the first call's are whole, so nothing has to be set to zero and added to
                continue
            totals = totals or tuple(map(torch.zeros_like, (q, k, v)))
            for total, place, part in zip(totals, (rows, columns, columns), parts, strict=True):
                total[place] += part
        return *totals, None, None, None


class HeadCopies(torch.autograd.Function):
    """Keys or values with a copy of the head before each prefix: a prefix then reads all it may in one call.

    Copying a few tokens costs less than another call of all queries with its merge. The backward pass gathers and sums
    instead of adding by index, whose order is not fixed on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """From (num_tokens, num_kv_heads, head_dim) to (places of ``layout.copies``, num_kv_heads, head_dim)."""
        ctx.layout = layout
        return x.index_select(0, layout.copies)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        own, heads = layout.copied_places
        total = grad.index_select(0, own)
        total[: layout.head] += grad.index_select(0, heads).unflatten(0, (-1, layout.head)).sum(0)
        return total, None


def merge_into(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge another part of the keys into ``out`` and ``lse``, in place."""
    total = torch.logaddexp(lse, part_lse)
    old, new = ((x - total).exp().t().unsqueeze(-1) for x in (lse, part_lse))
    out.copy_(out.float() * old + part.float() * new)
    lse.copy_(total)
