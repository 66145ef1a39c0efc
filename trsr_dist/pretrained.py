"""Reads causal language models of Hugging Face's format."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What a missing, damaged or foreign model raises."""


def load_causal(name_or_path: str, **options: Any) -> PreTrainedModel:
    """A model with all its weights.

    Args:
        name_or_path: folder or hub id.
        options: of ``from_pretrained``.

    Raises:
        ValueError: weights are missing: transformers would go on with random ones.
        OSError: or another of ``UNREADABLE``.
    """
    model, info = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return model


def leave_out_cudnn() -> None:
    """Do without cuDNN's attention, which PyTorch prefers on H100 and later: it plans anew for every length, which
    takes longer than the attention, and with a mask its gradients may be NaN (pytorch issue 196678)."""
    torch.backends.cuda.enable_cudnn_sdp(False)
