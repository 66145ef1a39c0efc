"""Attention over the tree of a packed row as a few calls of a flash kernel, merged exactly.

Each call gives an output and its log-sum-exp; the outputs are weighted together. The backward pass hands the *merged*
output and log-sum-exp to every call's backward kernel: with p = exp(s - lse_total) and D = rowsum(dout * out_total)
each of them is exactly its share of the gradient, as in ring attention (arXiv 2310.01889). Letting autograd pass
through the merge instead is wrong with FlashAttention 2, which drops the gradient of the log-sum-exp.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from trsr_dist.model.attention.layout import Call, Layout, decoded


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


_registered: list[tuple[Kernel, bool]] = []
"""Kernels by number, and whether they read copies of the head: an operator takes no Python objects."""


def register_kernel(kernel: Kernel, copies_head: bool) -> int:
    """The number by which ``tree_attention`` finds a kernel.

    Args:
        kernel: of the variable-length calls.
        copies_head: whether it takes causal segments with more keys than queries.
    """
    _registered.append((kernel, copies_head))
    return len(_registered) - 1


@torch.library.custom_op("trsr_dist::tree_attention", mutates_args=())
def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, code: torch.Tensor, kernel: int, answers_only: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged calls as one differentiable operator of PyTorch, which its compiler need not look into.

    Args:
        q: (num_queries, num_heads, head_dim).
        k: (num_tokens, num_kv_heads, head_dim).
        v: as ``k``.
        code: of the layout (``Layout.code``): compiled code meets every row's lengths as data.
        kernel: its number.
        answers_only: whether the queries are the answers' alone.
        scale: of the products of queries and keys.

    Returns:
        The output, as ``q``, and its log-sum-exp, float32 (num_heads, num_queries), which has no gradient.
    """
    layout, way = decoded(code, q.device), _registered[kernel]
    calls, is_copied = _calls(layout, way[1], answers_only)
    if is_copied:
        k, v = k.index_select(0, layout.copies), v.index_select(0, layout.copies)
    out, lse = way[0].forward(q, k[calls[0].keys], v[calls[0].keys], calls[0], scale)
    for call in calls[1:]:
        part, part_lse = way[0].forward(q[call.queries], k[call.keys], v[call.keys], call, scale)
        merge_into(out[call.queries], lse[:, call.queries], part, part_lse)
    return out.contiguous(), lse.contiguous()


@tree_attention.register_fake
def _(q: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("trsr_dist::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    grad: torch.Tensor, saved: list[torch.Tensor], kernel: int, answers_only: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; ``saved`` are q, k, v, the output, its log-sum-exp and the layout's code."""
    q, k, v, out, lse, code = saved
    layout, way = decoded(code, q.device), _registered[kernel]
    calls, is_copied = _calls(layout, way[1], answers_only)
    if is_copied:
        k, v = k.index_select(0, layout.copies), v.index_select(0, layout.copies)
    totals = _backward_calls(way[0], grad.contiguous(), (q, k, v, out, lse), calls, scale)
    if is_copied:
        totals = totals[0], _sum_copies(totals[1], layout), _sum_copies(totals[2], layout)
    return tuple(x.contiguous() for x in totals)


@tree_attention_backward.register_fake
def _(grad: torch.Tensor, saved: list[torch.Tensor], *rest: object) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in saved[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.kernel, ctx.answers_only, ctx.scale = inputs
    q, k, v, code = tensors
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, code)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grads = tree_attention_backward(grad, list(ctx.saved_tensors), ctx.kernel, ctx.answers_only, ctx.scale)
    return *grads, None, None, None, None


tree_attention.register_autograd(_backward, setup_context=_save)


def _calls(layout: Layout, copies_head: bool, answers_only: bool) -> tuple[tuple[Call, ...], bool]:
    """The calls, and whether they read copies of the head before each prefix: copying a few tokens costs less than
    another call of all queries with its merge."""
    if answers_only:
        return layout.answer_calls, False
    is_copied = copies_head and bool(layout.head)
    return layout.copied_calls if is_copied else layout.calls, is_copied


def _backward_calls(
    kernel: Kernel,
    grad: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    calls: tuple[Call, ...],
    scale: float,
) -> tuple[torch.Tensor, ...]:
    q, k, v, out, lse = saved
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
    return totals


def _sum_copies(grad: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Gradients of the tokens from those of ``layout.copies``. It gathers and sums instead of adding by index, whose
    order is not fixed on a GPU."""
    own, heads = layout.copied_places
    total = grad.index_select(0, own)
    total[: layout.head] += grad.index_select(0, heads).unflatten(0, (-1, layout.head)).sum(0)
    return total


def merge_into(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge another part of the keys into ``out`` and ``lse``, in place."""
    total = torch.logaddexp(lse, part_lse)
    old, new = ((x - total).exp().t().unsqueeze(-1) for x in (lse, part_lse))
    out.copy_(out.float() * old + part.float() * new)
    lse.copy_(total)
