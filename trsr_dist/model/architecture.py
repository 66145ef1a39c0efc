"""Which models may share prefixes: those on which it has been proven, within the lengths for which it holds."""

from __future__ import annotations

from transformers import PretrainedConfig

PROVEN = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type``. Their layers have q, k, v and o projections, optional norms of q and k, and a gated MLP."""
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary scalings that change with the longest position of a call, so that a row's prompts would touch each other."""


def sharing_hindrance(config: PretrainedConfig, max_tokens: int) -> str:
    """Why prompts of up to ``max_tokens`` cannot share prefixes with this model; empty where they can."""
    text = config.get_text_config()
    if config.model_type not in PROVEN:
        return f"architecture {config.model_type!r} has not been proven ({', '.join(PROVEN)} have)"
    window = shortest_window(text)
    if window and max_tokens > window:
        return f"its sliding window of {window} tokens is shorter than a prompt of {max_tokens} (prompt.max_tokens)"
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in LENGTH_DEPENDENT_ROPE:
        return f"its rotary scaling {rope!r} depends on the longest prompt of a row"
    return ""


def shortest_window(config: PretrainedConfig) -> int:
    """Length of the sliding window of the layers that have one; 0 where none has."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return 0
    return int(getattr(config, "sliding_window", None) or 0)
