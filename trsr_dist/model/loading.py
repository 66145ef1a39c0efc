"""Loads tokenizers and frozen base models from folders or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.log import get_logger
from trsr_dist.model.architecture import sharing_hindrance
from trsr_dist.model.attention.backends import choose_backend
from trsr_dist.model.zero3 import load_divided
from trsr_dist.pretrained import UNREADABLE, load_causal, max_positions

log = get_logger("model")


@dataclass(frozen=True, slots=True)
class BaseSource:
    """Which base model, and how it may be read."""

    name_or_path: str
    revision: str = ""
    trust_remote_code: bool = False
    quantization: str = "none"
    """none, 4bit or 8bit (bitsandbytes)."""

    @property
    def options(self) -> dict[str, Any]:
        """Common to all ``from_pretrained``."""
        revision = {"revision": self.revision} if self.revision and not Path(self.name_or_path).is_dir() else {}
        return {"trust_remote_code": self.trust_remote_code, **revision}


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes bfloat16 on a GPU that has it, else float32."""
    if precision != "auto":
        return precision
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def load_tokenizer(source: BaseSource) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        ModelError: it is not there or cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source.name_or_path, **source.options)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(source, "tokenizer", error) from None


def load_config(source: BaseSource) -> PretrainedConfig:
    """The model's config, without weights.

    Raises:
        ModelError: it is not there or cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(source.name_or_path, **source.options)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(source, "config", error) from None


def check_weights(source: BaseSource) -> None:
    """A local folder must hold weights; asked before a GPU is touched.

    Raises:
        ModelError: it holds none.
    """
    folder = Path(source.name_or_path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder}: no weights (*.safetensors); name a complete model folder with model.name_or_path (one with "
            "*.bin alone: load it with transformers and save_pretrained)"
        )


def load_base(source: BaseSource, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen base in ``dtype``, whole.

    Args:
        source: which.
        dtype: of the weights; a quantized base computes in it.
        device: where to.

    Raises:
        ModelError: the weights cannot be read.
    """
    options: dict[str, Any] = {"dtype": dtype, **source.options}
    if source.quantization != "none":
        options |= {"quantization_config": _quantization(source.quantization, dtype), "device_map": {"": device}}
    try:
        model = load_causal(source.name_or_path, **options)
    except UNREADABLE as error:
        raise _unreadable(source, "weights", error) from None
    model.requires_grad_(False)
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
    try:
        divided = load_divided(Path(source.name_or_path), config, dtype, zero_config, source.options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(source, "weights", error) from None
    model = divided.model if divided is not None else _load_through_rank_zero(source, dtype, zero_config)
    model.requires_grad_(False)
    refresh_rotary_tables(model)
    return model


def _load_through_rank_zero(source: BaseSource, dtype: torch.dtype, zero_config: dict[str, Any]) -> nn.Module:
    """As transformers does it, for files whose tensors must be renamed or put together."""
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(zero_config)  # transformers holds a weak reference only
    try:
        return AutoModelForCausalLM.from_pretrained(source.name_or_path, dtype=dtype, **source.options)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(source, "weights", error) from None
    finally:
        unset_hf_deepspeed_config()
        del kept


def refresh_rotary_tables(model: nn.Module) -> None:
    """Compute the rotary frequencies anew, in float32.

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
    """The back end of the shared-prefix attention, None (said aloud once) where prompts must run separately.

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


def _unreadable(source: BaseSource, what: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "" if Path(source.name_or_path).is_dir() else "; a hub model needs network once, or a local folder"
    return ModelError(f"model {source.name_or_path!r}: its {what} cannot be read ({reason}){hint}")
