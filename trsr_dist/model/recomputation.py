"""Activation checkpointing: what the backward pass needs of a layer is computed again there."""

from __future__ import annotations

from torch import nn


def enable_recomputation(model: nn.Module) -> None:
    """Keep each layer's input only (Chen et al., arXiv 1604.06174), without reentrant autograd.

    The last layer at the answers alone keeps its activations, which would be computed again at once; versions of
    transformers that recompute a layer's call instead of its ``forward`` (5.17) recompute that one too.
    """
    # transformers renamed the method in version 5.2x.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers also makes the embeddings' output require gradients, for reentrant autograd. Without that, no
    # gradient is computed below the first adapter.
    model.disable_input_require_grads()
