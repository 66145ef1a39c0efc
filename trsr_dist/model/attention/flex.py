"""FlexAttention (arXiv 2412.05496): the mask as a compiled block-sparse kernel; needs a GPU to train."""

from __future__ import annotations

from functools import cache

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trsr_dist.model.attention.layout import Layout

BLOCK = 128
RECOMPILE_LIMIT = 64
"""Kernels for training and inference, all queries and answers, short rows and long ones; by default dynamo gives up
after eight and runs the attention unfused."""


def flex_attention_tree(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, answers_only: bool, scale: float
) -> torch.Tensor:
    """Output of shape (num_queries, num_heads, head_dim); see ``backends.Attend``."""
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
        kept[answers_only] = _block_mask(layout, answers_only)
    return kept[answers_only]


def _block_mask(layout: Layout, answers_only: bool) -> BlockMask:
    own, above = layout.segments
    places = torch.arange(layout.num_tokens, device=layout.device)
    rows = layout.answer_index if answers_only else places

    def may_read(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        row = rows[query]
        return (key <= row) & ((own[key] == own[row]) | (own[key] == above[row]) | (own[key] == 0))

    return create_block_mask(may_read, None, None, len(rows), layout.num_tokens, device=layout.device, BLOCK_SIZE=BLOCK)


@cache
def _kernel(compiled: bool):  # noqa: ANN202
    if not compiled:
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # Row lengths change from step to step; without dynamic shapes each would be compiled anew.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
