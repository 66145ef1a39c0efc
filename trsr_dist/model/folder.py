"""Opens whatever can rank: a merged folder, a checkpoint, an adapter, or a plain base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trsr_dist.bases import ADAPTER_CONFIG, BaseName, base_folder, read_model_config
from trsr_dist.distributed import world_size
from trsr_dist.errors import ModelError
from trsr_dist.model.adapters import adapter_file, attach, read_adapter, read_adapter_config
from trsr_dist.model.fingerprint import base_fingerprint, check_same_base
from trsr_dist.model.loading import load_base, load_base_divided, shared_backend
from trsr_dist.model.places import PROVENANCE, check_checkpoint, follow, is_checkpoint, read_provenance, run_of
from trsr_dist.model.recommender import Recommender
from trsr_dist.model.zero3 import check_equal_calls, scoring_engine
from trsr_dist.pretrained import BaseSource, load_config, load_tokenizer, local_source
from trsr_dist.prompts.builder import PromptBuilder

RESTORE = "restore it"


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
class ModelPrompts:
    """What is known of a model without its weights: where it lies, and how its prompts are written."""

    place: ModelPlace
    tokenizer: Any
    builder: PromptBuilder
    trust_remote_code: bool

    @property
    def provenance(self) -> dict[str, Any]:
        """Empty where the folder records nothing."""
        return self.place.provenance


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
    if folder.name == "adapter" and is_checkpoint(folder.parent) and (folder.parent / PROVENANCE).is_file():
        folder = folder.parent  # which also knows the prompts of the training
    if is_checkpoint(folder):
        check_checkpoint(folder)
        return _with_base(folder / "adapter", read_provenance(folder), run_of(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_base(folder, read_provenance(folder), None)
    if folder.is_dir():
        read_model_config(folder)  # weights are looked at where they are needed
        return ModelPlace(str(folder), "", None, str(folder), read_provenance(folder))
    return ModelPlace(name_or_path, revision, None, name_or_path, {})


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
    is_here = own.name_or_path and (folder / "config.json").is_file()
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
    prompts = open_prompts(name_or_path, prompt, trust_remote_code, revision)
    model = load_weights(prompts, device, dtype, attention, zero_config)
    return LoadedModel(model, prompts.tokenizer, prompts.builder, prompts.provenance)


def open_prompts(
    name_or_path: str, prompt: dict[str, Any], trust_remote_code: bool = False, revision: str = ""
) -> ModelPrompts:
    """Find a model and open its tokenizer; arguments and errors as of ``open_model``."""
    place = find_model(name_or_path, revision)
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
) -> nn.Module:
    """A ``Recommender``, or DeepSpeed's engine around one; arguments and errors as of ``open_model``."""
    place, builder, device = prompts.place, prompts.builder, torch.device(device)
    adapter = None if place.adapter is None else read_adapter(place.adapter)
    source = local_source(BaseSource(place.base, place.revision, prompts.trust_remote_code))
    config = load_config(source)
    backend = shared_backend(config, attention, device, dtype, builder.max_tokens)
    if zero_config is None:
        base = load_base(source, dtype, device, config)
    else:
        check_equal_calls(backend, world_size())
        base = load_base_divided(source, dtype, zero_config)
    causal = base if adapter is None else attach(base, adapter).get_base_model()
    model = Recommender(causal, builder.answer_ids, backend).requires_grad_(False).eval()
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


def _with_base(adapter: Path, provenance: dict[str, Any], run: Path | None) -> ModelPlace:
    recorded = provenance.get("base", {})
    adapter_file(adapter)
    config = read_adapter_config(adapter / ADAPTER_CONFIG)
    name = recorded.get("name_or_path") or config.base_model_name_or_path
    if not name:
        raise ModelError(f"{adapter}: names no base model; merge it with --base first")
    revision = recorded.get("revision") or config.revision or ""
    wanted = BaseName(name, revision, recorded.get("fingerprint", ""))
    base = base_folder(wanted, run, "merge the adapter first and say with --base where its base is")
    if wanted.fingerprint:
        check_same_base(base, base_fingerprint(base), wanted.fingerprint, RESTORE)
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    return ModelPlace(str(base), "", adapter, str(adapter if has_tokenizer else base), provenance)
