"""Loads frozen base models, whole or divided, with what their prompts and attention need."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from trsr_dist.errors import ConfigError
from trsr_dist.log import get_logger
from trsr_dist.model.architecture import sharing_hindrance
from trsr_dist.model.attention.backends import choose_backend
from trsr_dist.model.zero3 import load_divided
from trsr_dist.pretrained import BaseSource, load_causal, load_config, max_positions

log = get_logger("model")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes bfloat16 on a GPU that has it, else float32."""
    if precision != "auto":
        return precision
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def load_base(
    source: BaseSource, dtype: torch.dtype, device: torch.device, config: PretrainedConfig | None = None
) -> nn.Module:
    """The frozen base in ``dtype``, whole.

    Args:
        source: which.
        dtype: of the weights; a quantized base computes in it.
        device: where to.
        config: of ``load_config``; None: it is read.

    Raises:
        ModelError: the weights cannot be read.
    """
    options: dict[str, Any] = {}
    if source.quantization != "none":
        options = {"quantization_config": _quantization(source.quantization, dtype), "device_map": {"": device}}
    model = load_causal(source, dtype, config, **options).requires_grad_(False)
    return model if source.quantization != "none" else model.to(device)


def load_base_divided(source: BaseSource, dtype: torch.dtype, zero_config: dict[str, Any]) -> nn.Module:
    """The frozen base under ZeRO-3. All ranks call it.

    Args:
        source: a local folder.
        dtype: of the weights.
        zero_config: DeepSpeed's, with stage 3.

    Raises:
        ModelError: the weights cannot be read.
    """
    config = load_config(source)
    divided = load_divided(source, config, dtype, zero_config)
    model = divided.model if divided is not None else _load_through_rank_zero(source, config, dtype, zero_config)
    model.requires_grad_(False)
    refresh_rotary_tables(model)
    return model


def _load_through_rank_zero(
    source: BaseSource, config: PretrainedConfig, dtype: torch.dtype, zero_config: dict[str, Any]
) -> nn.Module:
    """As transformers does it, for files whose tensors must be renamed or put together."""
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(zero_config)  # transformers holds a weak reference only
    try:
        return load_causal(source, dtype, config)
    finally:
        unset_hf_deepspeed_config()
        del kept


def refresh_rotary_tables(model: nn.Module) -> None:
    """Compute the rotary frequencies again, in float32.

    Within ZeRO-3's initialization DeepSpeed rounds every new tensor to the weights' dtype. Frequencies in bfloat16 turn
    a position of 1000 by whole radians.
    """
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "config"):
            fresh = type(module)(config=module.config)
            device = next(module.buffers()).device
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, fresh.to(device))


def shared_backend(
    config: PretrainedConfig, name: str, device: torch.device, dtype: torch.dtype, max_tokens: int
) -> str | None:
    """The back end of the shared-prefix attention, None (logged once) where prompts must run separately.

    Args:
        config: of the model.
        name: ``model.attention``.
        device: that the model runs on.
        dtype: of its weights.
        max_tokens: of the longest prompt.

    Raises:
        ConfigError: the asked back end cannot run here, or the model has no positions for such prompts.
    """
    check_positions(config, max_tokens)
    hindrance = sharing_hindrance(config, max_tokens)
    if hindrance:
        if name != "auto":
            raise ConfigError(f"model.attention={name}: prefixes cannot be shared: {hindrance}; use auto")
        log.info("prompts run as separate sequences: %s", hindrance)
        return None
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return choose_backend(name, device, dtype, head_dim)


def check_positions(config: PretrainedConfig, max_tokens: int) -> None:
    """Prompts must not be longer than the texts that the model has positions for.

    Raises:
        ConfigError: they may be: rotary positions would go on without a word, learned ones end in an index error.
    """
    limit = max_positions(config)
    if max_tokens > limit:
        raise ConfigError(
            f"prompt.max_tokens={max_tokens}: model {config.name_or_path!r} has positions for {limit} tokens "
            f"(max_position_embeddings in its config.json); set prompt.max_tokens={limit} or less"
        )


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"model.quantization={kind}: bitsandbytes is not installed (pip install 'trsr_dist[quantization]')"
        ) from None
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    # NF4 with double quantization, as QLoRA (arXiv 2305.14314).
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
