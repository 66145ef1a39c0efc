"""The one place that has transformers read tokenizers, configs and models.

Whatever a folder holds, it is decided here: custom code runs only where that was allowed (nothing is ever asked on
the terminal), no pickle is read, no adapter slips in, tied heads are those that the files hold, and every parameter
has a stored tensor of its shape.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from trsr_dist.bases import BaseName, base_folder, read_model_config
from trsr_dist.errors import ModelError, TrsrError
from trsr_dist.log import get_logger
from trsr_dist.weights import TensorEntry, has_weights, is_equal, named_entries

TOY_PARAMETERS = 100_000_000
"""Up to this size a model is at home on CPU cores."""
SHOWN = 300
"""Characters of a library's reason."""
OLD_NAMES = (".gamma", ".beta", ".weight_g", ".weight_v")
"""Ends of tensors that transformers renames as it reads them."""

log = get_logger("model")


@dataclass(frozen=True, slots=True)
class BaseSource:
    """Which base model, and how it may be read."""

    name_or_path: str
    revision: str = ""
    trust_remote_code: bool = False
    quantization: str = "none"
    """none, 4bit or 8bit (bitsandbytes), or fp8."""

    @property
    def is_local(self) -> bool:
        return Path(self.name_or_path).is_dir()

    @property
    def options(self) -> dict[str, Any]:
        """Common to all ``from_pretrained``."""
        revision = {"revision": self.revision} if self.revision and not self.is_local else {}
        return {"trust_remote_code": self.trust_remote_code, **revision}


@contextmanager
def _reading(source: BaseSource, what: str) -> Iterator[None]:
    """Libraries raise nearly every type for a missing, damaged or foreign model.

    Raises:
        ModelError: names model and reason.
    """
    try:
        yield
    except TrsrError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        hint = "" if source.is_local else "; a hub model needs network once, or a local folder"
        if "custom code" in str(error):
            reason = "it needs custom code, which runs only where that is allowed"
            hint = (
                "; read that code, then set model.trust_remote_code=true, summarize.trust_remote_code=true or "
                "tools/predict.py --trust-remote-code. tools/merge_lora.py runs none: merge with PEFT instead"
            )
        raise ModelError(f"model {source.name_or_path!r}: its {what} cannot be read ({reason}){hint}") from error


def load_tokenizer(source: BaseSource) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        ModelError: it is not there or cannot be read.
    """
    with _reading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.name_or_path, **source.options)


def load_config(source: BaseSource) -> PretrainedConfig:
    """The model's config; where its weights are here, they have been compared with it, and ties are as they are stored.

    Raises:
        ModelError: it is not there, cannot be read, or does not fit the weights.
    """
    config = declared_config(source)
    if not (source.is_local and has_weights(Path(source.name_or_path))):
        return config
    entries = named_entries(Path(source.name_or_path))
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(entries):
        raise ModelError(
            f"{source.name_or_path}: config.json says {layers} layers, the files hold {len(entries)} tensors: they do "
            "not belong together; copy the model again"
        )
    structure = read_structure(source, config)
    if has_untied_pair(structure, entries):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        structure = read_structure(source, config)
    if not getattr(config, "quantization_config", None):
        _check_stored(source, structure, entries)
    return config


def is_tied(config: PretrainedConfig) -> bool:
    """Whether the output head is the embedding."""
    return bool(getattr(config, "tie_word_embeddings", False))


def declared_config(source: BaseSource) -> PretrainedConfig:
    """The model's config as its file says it; most want ``load_config``.

    Raises:
        ModelError: it is not there or cannot be read, or is that of a classifier, which has no language head.
    """
    if source.is_local:
        read_model_config(Path(source.name_or_path))
    with _reading(source, "config"):
        config = AutoConfig.from_pretrained(source.name_or_path, **source.options)
    if any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise ModelError(
            f"model {source.name_or_path!r}: its config.json says {config.architectures[0]}, a classifier: servers "
            "load it, commands here do not; expected a causal language model: name the checkpoint, or merge it with "
            "tools/merge_lora.py --head causal"
        )
    return config


def build_model(config: PretrainedConfig, source: BaseSource, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model without the weights of its files, on PyTorch's device of the moment.

    Raises:
        ModelError: transformers cannot build it.
    """
    options = {} if dtype is None else {"dtype": dtype}
    with _reading(source, "structure"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code, **options)


@dataclass(frozen=True, slots=True)
class Structure:
    """Names in the model, which are those of the adapter."""

    model: PreTrainedModel
    """On the meta device: shapes, no weights."""
    tied: Mapping[str, str]
    """Tensors that share another's weights, with the other's name, such as lm_head and embed_tokens."""
    prefix: str
    """Of all but the head, such as ``transformer.``; a base that was saved without its head stores names without it."""

    def stored(self, name: str, entries: Container[str]) -> str:
        """The name under which a base with these ``entries`` stores a tensor of the model."""
        short = name.removeprefix(self.prefix)
        return short if name not in entries and short in entries else name


def read_structure(source: BaseSource, config: PretrainedConfig) -> Structure:
    """Build a model without its weights.

    Raises:
        ModelError: transformers does not know this architecture, or not without custom code.
    """
    with torch.device("meta"):
        model = build_model(config, source)
    return Structure(model, dict(model.all_tied_weights_keys), f"{model.base_model_prefix}.")


def local_source(source: BaseSource) -> BaseSource:
    """The same model in a local folder, checked; one of the hub is fetched.

    Raises:
        ModelError: it is neither here nor on the hub, or is no complete base.
    """
    name, remedy = BaseName(source.name_or_path, source.revision, ""), "name a model's folder or hub id"
    folder = base_folder(name, None, remedy, source.trust_remote_code)
    return replace(source, name_or_path=str(folder), revision="")


def load_causal(
    source: BaseSource, dtype: torch.dtype, config: PretrainedConfig | None = None, **options: Any
) -> PreTrainedModel:
    """A model with all its weights.

    Args:
        source: which.
        dtype: of the weights.
        config: of ``load_config``; None: it is read.
        options: further ones of ``from_pretrained``.

    Raises:
        ModelError: it is not there, is damaged, or weights are missing: transformers would go on with random ones.
    """
    local = local_source(source)
    config = load_config(local) if config is None else config
    with _reading(source, "weights"):
        model, info = AutoModelForCausalLM.from_pretrained(
            local.name_or_path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True,
            **local.options, **options,
        )  # fmt: skip
    _refuse_missing(local, sorted(info["missing_keys"]))
    return model


def warn_without_gpu(model: PreTrainedModel, name: str) -> None:
    """Say so where no GPU is there for a large model that a stage is to run for long."""
    count = model.num_parameters()
    if count > TOY_PARAMETERS and not torch.cuda.is_available():
        log.info(
            "no GPU is seen: the %.2f billion parameters of %s run on CPU cores, far slower; under Slurm ask for GPUs, "
            "see slurm/site.sh",
            count / 1e9,
            name,
        )


def load_classifier(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A ``*ForSequenceClassification`` with all its weights.

    Raises:
        ModelError: it is damaged, or weights are missing.
    """
    source = BaseSource(str(folder))
    with _reading(source, "weights"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.name_or_path, dtype=dtype, output_loading_info=True, use_safetensors=True, **source.options
        )
    _refuse_missing(source, sorted(info["missing_keys"]))
    return model


def read_gguf(path: Path) -> tuple[PreTrainedModel, Any]:
    """Model in float32 and tokenizer of a GGUF file, its blocks written out.

    Raises:
        ModelError: it cannot be read, or the package ``gguf`` is missing.
    """
    source = BaseSource(str(path.parent))
    options = {"gguf_file": path.name, "trust_remote_code": False}
    with _reading(source, "GGUF file"):
        model = AutoModelForCausalLM.from_pretrained(source.name_or_path, dtype=torch.float32, **options)
        return model, AutoTokenizer.from_pretrained(source.name_or_path, **options)


def has_untied_pair(structure: Structure, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether the files hold two tensors with different values that the config ties. transformers' own rule: what is
    stored wins."""
    for pair in structure.tied.items():
        one, other = (entries.get(structure.stored(name, entries)) for name in pair)
        if one is not None and other is not None and not is_equal(one, other):
            return True
    return False


def _check_stored(source: BaseSource, structure: Structure, entries: Mapping[str, TensorEntry]) -> None:
    model = structure.model
    if get_model_conversion_mapping(model, add_legacy=False) or any(name.endswith(OLD_NAMES) for name in entries):
        return  # names and shapes change while transformers reads them; it compares them itself
    shared = structure.tied | {other: one for one, other in structure.tied.items()}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        entry = entries.get(structure.stored(name, entries))
        if entry is None:
            is_shared = name in shared and structure.stored(shared[name], entries) in entries
            if not is_shared and not any(re.search(pattern, name) for pattern in optional):
                missing.append(name)
        elif entry.shape != tuple(parameter.shape):
            raise ModelError(
                f"{entry.file}: {name} has shape {entry.shape}, config.json says {tuple(parameter.shape)}: they do not "
                "belong together; copy the model again"
            )
        elif not entry.code.startswith(("F", "BF")):
            raise ModelError(f"{entry.file}: {name} has dtype {entry.code}, expected a floating type; copy it again")
    _refuse_missing(source, missing)


def _refuse_missing(source: BaseSource, missing: list[str]) -> None:
    if not missing:
        return
    head = [name for name in missing if name.startswith("lm_head")]
    remedy = "copy the model again"
    if head:
        remedy = "where the head is the embedding, its config.json must say tie_word_embeddings=true; else " + remedy
    raise ModelError(
        f"model {source.name_or_path!r}: its weights cannot be read ({len(missing)} are missing, the first is "
        f"{(head or missing)[0]}); {remedy}"
    )


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
