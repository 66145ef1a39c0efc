"""Attention with the full mask: quadratic in the row, differentiable by autograd alone; the oracle of the tests."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from trsr_dist.model.attention.layout import Layout


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, answers_only: bool, scale: float
) -> torch.Tensor:
    """Output of shape (num_queries, num_heads, head_dim); see ``backends.Attend``."""
    mask = layout.mask[layout.answer_index] if answers_only else layout.mask
    group = q.shape[1] // k.shape[1]
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)
