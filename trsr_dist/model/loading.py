"""Finds and loads whatever can rank: a merged folder, a checkpoint, an adapter, or a plain base model.

Frozen bases are loaded whole or divided, with what their prompts and attention need.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from trsr_dist.bases import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    BASE_FILES,
    CONFIG,
    BaseName,
    adapter_file,
    base_folder,
    fetch,
    hub_file,
    read_model_config,
)
from trsr_dist.distributed import world_size
from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.log import get_logger
from trsr_dist.model.adapters import attach, read_adapter, read_adapter_config
from trsr_dist.model.artifacts import (
    PROVENANCE,
    base_fingerprint,
    check_checkpoint,
    check_same_base,
    follow,
    is_checkpoint,
    read_provenance,
    run_of,
)
from trsr_dist.model.attention.self_check import Heads, choose_checked
from trsr_dist.model.compilation import check_compilable, compile_layers, warm_up
from trsr_dist.model.fp8 import hold_in_fp8
from trsr_dist.model.recommender import Recommender, length_limit
from trsr_dist.model.zero3 import check_equal_calls, load_divided, scoring_engine
from trsr_dist.pretrained import (
    BaseSource,
    bitsandbytes_config,
    build_model,
    load_causal,
    load_config,
    load_tokenizer,
    local_source,
    max_positions,
    warn_without_gpu,
)
from trsr_dist.prompts.builder import PromptBuilder

RESTORE = "restore it"
PROVEN = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type``. Their layers have q, k, v and o projections, optional norms of q and k, and a gated MLP."""

log = get_logger("model")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model that was found, not yet loaded."""

    base: str
    """Folder or hub id of the weights."""
    revision: str
    adapter: Path | None
    tokenizer: str
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelPrompts:
    """What is known of a model without its weights: where it lies, and how its prompts are written."""

    found: FoundModel
    tokenizer: Any
    builder: PromptBuilder
    trust_remote_code: bool

    @property
    def provenance(self) -> dict[str, Any]:
        """Empty where the folder records nothing."""
        return self.found.provenance


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with the prompts that it was trained on."""

    model: nn.Module
    """A ``Recommender``, or DeepSpeed's engine around one."""
    tokenizer: Any
    builder: PromptBuilder
    provenance: dict[str, Any]
    """Empty where the folder records nothing."""


def find_model(name_or_path: str, revision: str = "", with_code: bool = False) -> FoundModel:
    """What a path or hub id (with a revision) stands for; ``with_code``: a base is fetched with its own code.

    Raises:
        CheckpointError: an incomplete or damaged checkpoint.
        ModelError: an adapter whose base is not here, or is another one than in training.
    """
    folder = follow(Path(name_or_path))
    if is_checkpoint(folder):
        check_checkpoint(folder)
        return _with_base(folder / "adapter", read_provenance(folder), run_of(folder), with_code)
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_base(folder, read_provenance(folder), None, with_code)
    if folder.is_dir():
        read_model_config(folder)  # weights are looked at where they are needed
        return FoundModel(str(folder), "", None, str(folder), read_provenance(folder))
    if hub_file(name_or_path, revision, ADAPTER_CONFIG) is not None:
        wanted = BaseName(name_or_path, revision, "")
        folder = fetch(wanted, "name the adapter's folder or hub id", [*BASE_FILES, ADAPTER_PICKLE])
        return _with_base(folder, read_provenance(folder), None, with_code)
    recorded = hub_file(name_or_path, revision, PROVENANCE)
    provenance = {} if recorded is None else read_provenance(recorded.parent)
    return FoundModel(name_or_path, revision, None, name_or_path, provenance)


def find_base(name_or_path: str, own: BaseName, run: Path, remedy: str) -> Path:
    """Folder of the model before fine-tuning, by what a checkpoint, an adapter or a merged model records of it.

    Args:
        name_or_path: of the fine-tuned model.
        own: the config's base: taken where nothing is recorded, and where it is the recorded one in another place.
        run: the run folder: one that was moved keeps its base.
        remedy: ends the error.

    Raises:
        CheckpointError: an incomplete or damaged checkpoint.
        ModelError: the base is not here, or is another one than in training.
    """
    place = find_model(name_or_path)
    if place.adapter is not None:
        return Path(place.base)
    recorded = place.provenance.get("base", {})
    fingerprint, folder = recorded.get("fingerprint", ""), Path(own.name_or_path)
    is_here = own.name_or_path and (folder / CONFIG).is_file()
    if not recorded or (is_here and base_fingerprint(folder) == fingerprint):
        if not own.name_or_path:
            raise ModelError(f"{name_or_path}: records no base, and model.name_or_path is empty; {remedy}")
        return base_folder(own, run, remedy)
    base = base_folder(BaseName(recorded["name_or_path"], recorded.get("revision", ""), fingerprint), run, remedy)
    check_same_base(base, base_fingerprint(base), fingerprint, RESTORE)
    return base


def open_model(
    name_or_path: str,
    device: torch.device | str,
    dtype: torch.dtype,
    prompt: dict[str, Any],
    attention: str = "auto",
    trust_remote_code: bool = False,
    zero_config: dict[str, Any] | None = None,
) -> LoadedModel:
    """Load a model for scoring. With ``zero_config`` all ranks call it, and run the model together.

    Args:
        name_or_path: merged folder, checkpoint (or a pointer to one), adapter, base model folder or hub id.
        device: where to.
        dtype: of the weights.
        prompt: settings of the prompts where the folder records none.
        attention: back end of the shared-prefix attention.
        trust_remote_code: run model code from the hub.
        zero_config: of DeepSpeed's stage 3 (``scoring_config``): the ranks divide the weights; None: all of them here.

    Raises:
        CheckpointError: an incomplete or damaged checkpoint.
        ConfigError: a model that several ranks cannot divide.
        ModelError: the model cannot be read, or its tokenizer is not that of the training.
    """
    prompts = open_prompts(name_or_path, prompt, trust_remote_code)
    model = load_weights(prompts, device, dtype, attention, zero_config)
    return LoadedModel(model, prompts.tokenizer, prompts.builder, prompts.provenance)


def open_prompts(
    name_or_path: str, prompt: dict[str, Any], trust_remote_code: bool = False, revision: str = ""
) -> ModelPrompts:
    """Find a model and open its tokenizer; arguments and errors as of ``open_model``."""
    place = find_model(name_or_path, revision, trust_remote_code)
    tokenizer = load_tokenizer(BaseSource(place.tokenizer, place.revision, trust_remote_code))
    builder = PromptBuilder(tokenizer, **(place.provenance.get("prompt") or prompt))
    check_answers(name_or_path, builder, place.provenance)
    return ModelPrompts(place, tokenizer, builder, trust_remote_code)


def load_weights(
    prompts: ModelPrompts,
    device: torch.device | str,
    dtype: torch.dtype,
    attention: str = "auto",
    zero_config: dict[str, Any] | None = None,
    compiled: bool = False,
) -> nn.Module:
    """A ``Recommender``, or DeepSpeed's engine around one; arguments and errors as of ``open_model``. With ``compiled``
    its layers are, before this returns."""
    place, builder, device = prompts.found, prompts.builder, torch.device(device)
    adapter = None if place.adapter is None else read_adapter(place.adapter)
    source = local_source(BaseSource(place.base, place.revision, prompts.trust_remote_code))
    config = load_config(source)
    backend = shared_backend(config, attention, device, dtype, builder.max_tokens)
    held = prompts.provenance.get("config", {}).get("model", {}).get("quantization", "none")
    if held != "none":
        log.info("trained with model.quantization=%s; scored on the whole base", held)
    if compiled:
        check_compilable(backend, "none", 0 if zero_config is None else 3, "none")
    if zero_config is None:
        base = load_base(source, dtype, device, config)
    else:
        check_equal_calls(backend, world_size())
        base = load_base_divided(source, dtype, zero_config)
    causal = base if adapter is None else attach(base, adapter).get_base_model()
    model = Recommender(causal, builder.answer_ids, backend).requires_grad_(False).eval()
    if compiled:
        compile_layers(model)
        warm_up(model, answers_only=True)
    return model if zero_config is None else scoring_engine(model, zero_config)


def check_answers(name: str, builder: PromptBuilder, provenance: dict[str, Any]) -> None:
    """The tokenizer must give the answer tokens of the training.

    Raises:
        ModelError: it does not.
    """
    recorded = provenance.get("answer_ids")
    if recorded and list(recorded) != list(builder.answer_ids):
        raise ModelError(
            f"{name}: trained with answer tokens {tuple(recorded)}, its tokenizer gives {tuple(builder.answer_ids)}; "
            "the tokenizer files are not those of the training"
        )


def _with_base(adapter: Path, provenance: dict[str, Any], run: Path | None, with_code: bool) -> FoundModel:
    recorded = provenance.get("base", {})
    adapter_file(adapter)
    config = read_adapter_config(adapter / ADAPTER_CONFIG)
    name = recorded.get("name_or_path") or config.base_model_name_or_path
    if not name:
        raise ModelError(f"{adapter}: names no base model; merge it with --base first")
    revision = recorded.get("revision") or config.revision or ""
    wanted = BaseName(name, revision, recorded.get("fingerprint", ""))
    base = base_folder(wanted, run, "merge the adapter first and say with --base where its base is", with_code)
    if wanted.fingerprint:
        check_same_base(base, base_fingerprint(base), wanted.fingerprint, RESTORE)
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    return FoundModel(str(base), "", adapter, str(adapter if has_tokenizer else base), provenance)


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
        ConfigError: the base cannot be quantized here.
        ModelError: the weights cannot be read.
    """
    options: dict[str, Any] = {}
    if source.quantization in ("4bit", "8bit"):
        options = {"quantization_config": bitsandbytes_config(source.quantization, dtype), "device_map": {"": device}}
    model = load_causal(source, dtype, config, **options).requires_grad_(False)
    if source.quantization == "fp8":
        hold_in_fp8(model, device)
    warn_without_gpu(model, source.name_or_path)
    return model if options else model.to(device)


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
    divided = load_divided(Path(source.name_or_path), lambda: build_model(config, source, dtype), zero_config)
    if divided is not None:
        model, _ = divided
    else:  # as transformers does it, for files whose tensors must be renamed or put together
        from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

        kept = HfDeepSpeedConfig(zero_config)  # transformers holds a weak reference only
        try:
            model = load_causal(source, dtype, config)
        finally:
            unset_hf_deepspeed_config()
            del kept
    model.requires_grad_(False)
    refresh_rotary_tables(model)
    return model


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
    limit = max_positions(config)
    if max_tokens > limit:  # rotary positions would go on without a word, learned ones end in an index error
        raise ConfigError(
            f"prompt.max_tokens={max_tokens}: model {config.name_or_path!r} has positions for {limit} tokens "
            f"(max_position_embeddings in its config.json); set prompt.max_tokens={limit} or less"
        )
    reason = why_not_shared(config, max_tokens)
    if reason:
        if name != "auto":
            raise ConfigError(f"model.attention={name}: prefixes cannot be shared: {reason}; use auto")
        log.info("prompts run as separate sequences: %s", reason)
        return None
    text = config.get_text_config()
    num_heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    heads = Heads(num_heads, getattr(text, "num_key_value_heads", None) or num_heads, head_dim)
    return choose_checked(name, device, dtype, heads)


def why_not_shared(config: PretrainedConfig, max_tokens: int) -> str:
    """Why prompts of up to ``max_tokens`` cannot share prefixes with this model; empty where they can."""
    text = config.get_text_config()
    if config.model_type not in PROVEN:
        return f"architecture {config.model_type!r} has not been proven ({', '.join(PROVEN)} have)"
    kinds = getattr(text, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    window = int(getattr(text, "sliding_window", None) or 0) if slides else 0
    if window and max_tokens > window:
        return f"its sliding window of {window} tokens is shorter than a prompt of {max_tokens} (prompt.max_tokens)"
    if length_limit(config):
        return f"its rotary scaling {text.rope_parameters['rope_type']!r} depends on the longest prompt of a row"
    return ""
