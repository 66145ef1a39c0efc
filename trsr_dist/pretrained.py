"""Reads causal language models of Hugging Face's format."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

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


def leave_out_cudnn() -> None:
    """Do without cuDNN's attention, which PyTorch prefers on H100 and later: it plans anew for every length, which
    takes longer than the attention, and with a mask its gradients may be NaN (pytorch issue 196678)."""
    torch.backends.cuda.enable_cudnn_sdp(False)
