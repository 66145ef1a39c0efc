"""Reads causal language models of Hugging Face's format."""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trsr_dist.log import get_logger

TOY_PARAMETERS = 100_000_000
"""Up to so many a model is at home on CPU cores."""
UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""What a missing, damaged or foreign model raises."""


log = get_logger("model")


def load_causal(name_or_path: str, **options: Any) -> PreTrainedModel:
    """A model with all its weights; says so where no GPU is there for a large one.

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
    count = model.num_parameters()
    if count > TOY_PARAMETERS and not torch.cuda.is_available():
        log.info(
            "no GPU is seen: the %.2f billion parameters of %s run on CPU cores, far slower; under Slurm ask for GPUs, "
            "see slurm/site.sh",
            count / 1e9,
            name_or_path,
        )
    return model


def max_positions(config: PretrainedConfig) -> int:
    """Tokens of the longest text that a model has positions for, its rotary scaling included; ``sys.maxsize`` where the
    config names no limit, or the positions are linear biases (ALiBi)."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not limit or getattr(text, "alibi", False):
        return sys.maxsize
    rope = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    scalings = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    # Some configs name the length before scaling, some the length after it.
    scaled = [
        (part.get("original_max_position_embeddings") or limit) * (part.get("factor") or 1.0) for part in scalings
    ]
    return max(limit, *map(int, scaled), 0)


def leave_out_cudnn() -> None:
    """Do without cuDNN's attention, which PyTorch prefers on H100 and later: it plans anew for every length, which
    takes longer than the attention, and with a mask its gradients may be NaN (pytorch issue 196678)."""
    torch.backends.cuda.enable_cudnn_sdp(False)
