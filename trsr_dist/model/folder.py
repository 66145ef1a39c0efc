"""Opens whatever can rank: a merged folder, a checkpoint, an adapter, or a plain base model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from trsr_dist.distributed import world_size
from trsr_dist.errors import ModelError
from trsr_dist.files import read_json
from trsr_dist.model.fingerprint import base_fingerprint
from trsr_dist.model.loading import (
    BaseSource,
    load_base,
    load_base_divided,
    load_config,
    load_tokenizer,
    shared_backend,
)
from trsr_dist.model.places import (
    ADAPTER_CONFIG,
    BaseName,
    base_folder,
    check_checkpoint,
    follow,
    is_checkpoint,
    read_provenance,
    run_of,
)
from trsr_dist.model.recommender import Recommender
from trsr_dist.model.zero3 import check_equal_calls, scoring_engine
from trsr_dist.prompts.builder import PromptBuilder


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """A model that was found, not yet loaded."""

    base: str
    """Folder or hub id of the weights."""
    revision: str
    adapter: Path | None
    tokenizer: str
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with the prompts that it was trained on."""

    model: nn.Module
    """A ``Recommender``, or DeepSpeed's engine around one."""
    tokenizer: Any
    builder: PromptBuilder
    provenance: dict[str, Any]
    """Empty where the folder records nothing."""


def find_model(name_or_path: str, revision: str = "") -> ModelPlace:
    """What a path or hub id (with a revision) stands for.

    Raises:
        CheckpointError: an incomplete or damaged checkpoint.
        ModelError: an adapter whose base is not here, or is another one than in training.
    """
    folder = follow(Path(name_or_path))
    if folder.name == "adapter" and is_checkpoint(folder.parent):
        folder = folder.parent  # which also knows the prompts of the training
    if is_checkpoint(folder):
        check_checkpoint(folder)
        return _with_base(folder / "adapter", read_provenance(folder), run_of(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_base(folder, read_provenance(folder), None)
    if folder.is_dir():
        return ModelPlace(str(folder), "", None, str(folder), read_provenance(folder))
    return ModelPlace(name_or_path, revision, None, name_or_path, {})


def open_model(
    name_or_path: str,
    device: torch.device | str,
    dtype: torch.dtype,
    prompt: dict[str, Any],
    attention: str = "auto",
    trust_remote_code: bool = False,
    zero_config: dict[str, Any] | None = None,
    revision: str = "",
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
        revision: of a hub id; empty: the default branch.

    Raises:
        CheckpointError: an incomplete or damaged checkpoint.
        ConfigError: a model that several ranks cannot divide.
        ModelError: the model cannot be read, or its tokenizer is not that of the training.
    """
    place = find_model(name_or_path, revision)
    source = BaseSource(place.base, place.revision, trust_remote_code)
    tokenizer = load_tokenizer(BaseSource(place.tokenizer, place.revision, trust_remote_code))
    builder = PromptBuilder(tokenizer, **(place.provenance.get("prompt") or prompt))
    check_answers(name_or_path, builder, place.provenance)
    device = torch.device(device)
    config = load_config(source)
    backend = shared_backend(config, attention, device, dtype, builder.max_tokens)
    if zero_config is not None:
        check_equal_calls(backend, world_size())
    base = load_base(source, dtype, device) if zero_config is None else load_divided_base(source, dtype, zero_config)
    model = Recommender(with_adapter(base, place.adapter), builder.answer_ids, backend).requires_grad_(False).eval()
    runner = model if zero_config is None else scoring_engine(model, zero_config)
    return LoadedModel(runner, tokenizer, builder, place.provenance)


def load_divided_base(source: BaseSource, dtype: torch.dtype, zero_config: dict[str, Any]) -> nn.Module:
    """A base whose weights lie divided over the ranks; one of the hub is fetched first."""
    name, remedy = BaseName(source.name_or_path, source.revision, ""), "name a model's folder or hub id"
    folder = base_folder(name, None, remedy, source.trust_remote_code)
    return load_base_divided(replace(source, name_or_path=str(folder)), dtype, zero_config)


def with_adapter(base: nn.Module, adapter: Path | None) -> nn.Module:
    """The base with an adapter's layers in it, of any kind that PEFT reads."""
    if adapter is None:
        return base
    return PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False).get_base_model()


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


def _with_base(adapter: Path, provenance: dict[str, Any], run: Path | None) -> ModelPlace:
    recorded = provenance.get("base", {})
    config = read_json(adapter / ADAPTER_CONFIG)
    name = recorded.get("name_or_path") or config.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{adapter}: names no base model; merge it with --base first")
    revision = recorded.get("revision") or config.get("revision") or ""
    wanted = BaseName(name, revision, recorded.get("fingerprint", ""))
    base = base_folder(wanted, run, "merge the adapter first and say with --base where its base is")
    _check_base(base, recorded.get("fingerprint", ""))
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    return ModelPlace(str(base), "", adapter, str(adapter if has_tokenizer else base), provenance)


def _check_base(folder: Path, recorded: str) -> None:
    if recorded and base_fingerprint(folder) != recorded:
        raise ModelError(
            f"{folder}: not the base that the adapter was trained on (fingerprint {recorded[:12]}...): another one, or "
            "its files have changed; restore it"
        )
