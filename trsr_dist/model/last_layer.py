"""The last decoder layer at the answers alone: elsewhere only its keys and values are needed.

Exact: nothing reads the last layer's other outputs. Everything after the keys and values runs on one position a prompt.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from trsr_dist.model.attention.backends import Attend
from trsr_dist.model.attention.layout import Layout


def answer_at_last_layer(decoder: nn.Module) -> None:
    """Make the last layer of a decoder (Llama's layout) return the answers' states when asked with ``answers_only``."""
    layer = decoder.layers[-1]
    layer.forward = partial(_forward, layer, layer.forward)


def _forward(
    layer: nn.Module, whole: Any, hidden: torch.Tensor, *args: Any, answers_only: bool = False, **kwargs: Any
) -> torch.Tensor:
    """(1, num_tokens, hidden_size) to (1, num_answers, hidden_size), or as the layer itself."""
    if not answers_only:
        return whole(hidden, *args, **kwargs)
    layout, attend = kwargs["tree"]
    states = layer.input_layernorm(hidden)
    attended = _attention(layer.self_attn, states, kwargs["position_embeddings"], layout, attend)
    answers = hidden[:, layout.answer_index] + attended
    return answers + layer.mlp(layer.post_attention_layernorm(answers))


def _attention(
    module: nn.Module,
    states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    layout: Layout,
    attend: Attend,
) -> torch.Tensor:
    cos, sin = (x[0, :, None] for x in position_embeddings)
    index = layout.answer_index
    q = _heads(module, "q", states[:, index])
    k, v = _heads(module, "k", states), _heads(module, "v", states)
    q, k = rotate(q, cos[index], sin[index]), rotate(k, cos, sin)
    out = attend(q, k, v, layout, True, module.scaling)
    return module.o_proj(out.flatten(1)[None])


def _heads(module: nn.Module, name: str, states: torch.Tensor) -> torch.Tensor:
    """Projected states of shape (num_tokens, num_heads, head_dim), normalized where the architecture does so."""
    heads = getattr(module, f"{name}_proj")(states)[0].unflatten(-1, (-1, module.head_dim))
    norm = getattr(module, f"{name}_norm", None)
    return heads if norm is None else norm(heads)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) in the half-split form of Llama, Mistral and Qwen."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
