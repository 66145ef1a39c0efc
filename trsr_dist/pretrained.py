"""Reads causal language models of Hugging Face's format."""

from __future__ import annotations

from typing import Any

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
