"""Everything that is read and checked before the first byte is written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.pytorch_utils import Conv1D

from trsr_dist.bases import BaseName
from trsr_dist.config.sections import PromptSection
from trsr_dist.errors import ModelError, RunError, TrsrError
from trsr_dist.log import get_logger
from trsr_dist.merge.changes import find_changes
from trsr_dist.merge.classifier import check_head, config_values, padding_token
from trsr_dist.merge.plan import MergePlan, classifier_plan, make_plan
from trsr_dist.merge.source import Source
from trsr_dist.model.adapters import Adapter, attach
from trsr_dist.model.artifacts import check_same_base
from trsr_dist.model.loading import check_answers
from trsr_dist.pretrained import BaseSource, declared_config, is_tied, load_config, load_tokenizer, read_structure
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import MANIFEST, read_manifest
from trsr_dist.weights import folder_entries

logger = get_logger("merge")
STAGE = "merge"
SPARE_BYTES = 2**26
"""Room for everything beside the weights."""
OF_WEIGHTS = ("head", "dtype", "max_shard_size", "verify", "tolerance")
"""Options that mean nothing where no merged weights are written."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What the command line asks for."""

    base: str | None = None
    """Folder or hub id; None: the one the checkpoint names."""
    adapter_only: bool = False
    head: Literal["causal", "classifier"] = "causal"
    """classifier: one label, whose logit is the log-odds of yes."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    max_shard_size: int | None = None
    """Bytes of a file; None: the base's files."""
    verify: Literal["auto", "scores", "weights", "none"] = "auto"
    """auto: scores where memory allows, else weights."""
    tolerance: float | None = None
    """Largest log-odds difference; None: by dtype."""
    force: bool = False
    """Make an earlier merge again."""
    update: bool = False
    """Make it again if its checkpoint or settings have changed since."""
    dry_run: bool = False

    @property
    def of_weights(self) -> str:
        """Those of ``OF_WEIGHTS`` that are given, as on the command line."""
        given = (name for name in OF_WEIGHTS if getattr(self, name) != getattr(MergeOptions(), name))
        return ", ".join(f"--{name.replace('_', '-')}" for name in given)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that was read and checked before the first byte is written."""

    source: Source
    adapter: Adapter
    base_name: BaseName
    base: Path
    fingerprint: str
    plan: MergePlan
    builder: PromptBuilder | None
    dtype: torch.dtype
    """Of the merged weights."""
    config_values: dict[str, Any]
    """What config.json of the output says beside the base's."""
    padding: str = ""
    """Token that the output's tokenizer pads with; empty: its own."""

    @property
    def tokenizer(self) -> Path:
        return self.source.tokenizer or self.base


def prepare(
    source: Source, adapter: Adapter, base_name: BaseName, base: Path, fingerprint: str, options: MergeOptions
) -> Inputs:
    """Check that adapter, base and tokenizer fit together, and plan the output."""
    check_same_base(base, fingerprint, base_name.fingerprint, "name the right one with --base")
    model = BaseSource(str(base))
    declared = declared_config(model)
    if getattr(declared, "quantization_config", None):
        raise ModelError(f"{base}: a quantized model; name its unquantized original with --base")
    by_file = folder_entries(base)
    entries = {entry.name: entry for entries in by_file for entry in entries}
    config = load_config(model)
    structure = read_structure(model, config)
    transposed = {name for name, module in structure.model.named_modules() if isinstance(module, Conv1D)}
    changes = find_changes(adapter, transposed)
    attach(structure.model, adapter)
    changes = {structure.stored(name, entries): change for name, change in changes.items()}
    tied = {structure.stored(one, entries): structure.stored(other, entries) for one, other in structure.tied.items()}
    dtype = DTYPES.get(options.dtype)
    keep_tied = bool(adapter.config.ensure_weight_tying)
    unties = is_tied(declared) and not is_tied(config)
    plan = make_plan(by_file, changes, tied, keep_tied, dtype, options.max_shard_size, unties)
    vocabulary = config.get_text_config().vocab_size
    builder = resolve_prompt(source.tokenizer or base, source.tokenizer is None, vocabulary, source.provenance)
    values, padding = {}, ""
    if options.head == "classifier":
        check_head(base, config, entries, builder)
        plan = classifier_plan(plan, tied, structure.prefix, builder.answer_ids)
        padding, pad_id = padding_token(builder, vocabulary)
        values = config_values(config.model_type, builder, pad_id)
    changed = sum(output.change is not None for output in plan.outputs)
    logger.info(
        f"{source.kind} {source.folder.name}: {len(changes)} changes, {adapter.num_bytes / 1e6:.1f} MB of adapter; "
        f"base {base_name.name_or_path}: {len(entries)} tensors, {changed} of {len(plan.outputs)} written are changed"
    )
    main_dtype = dtype or max(entries.values(), key=lambda entry: entry.num_bytes).dtype
    return Inputs(source, adapter, base_name, base, fingerprint, plan, builder, main_dtype, values, padding)


def check_output(output: Path, inputs: list[Path], force: bool) -> None:
    """The output must be new, empty, or an earlier merge.

    Raises:
        RunError: it holds other files, or is one of the inputs.
    """
    for path in inputs:
        if output.resolve() == path.resolve() or output.resolve() in path.resolve().parents:
            raise RunError(f"{output}: is or holds the input {path}; choose another --output")
    if output.exists() and not output.is_dir():
        raise RunError(f"{output}: a file; choose another --output")
    if force and output.is_dir() and any(output.iterdir()):
        manifest = read_manifest(output) if (output / MANIFEST).is_file() else {}
        if manifest.get("stage") != STAGE:
            raise RunError(
                f"{output}: holds files that are no earlier merge, and only such a one is replaced. Empty it first"
            )


def check_space(output: Path, num_bytes: int) -> None:
    """The old output stays until the new one is whole, so that both must fit.

    Raises:
        RunError: too little room on the output's file system.
    """
    parent = next(path for path in [output.absolute(), *output.absolute().parents] if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes + SPARE_BYTES:
        raise RunError(
            f"{output}: needs {(num_bytes + SPARE_BYTES) / 1e9:.2f} GB beside what is there, {free / 1e9:.2f} GB are "
            "free; make room or choose another --output"
        )


def resolve_prompt(folder: Path, own: bool, num_embeddings: int, provenance: dict[str, Any]) -> PromptBuilder | None:
    """The prompt builder of the training, checked against this tokenizer. Where none is recorded, that of the default
    settings, with which every command ranks then; None where their answers are no single tokens.

    Args:
        folder: holds the tokenizer.
        own: it is the base's own folder.

    Raises:
        ModelError: the tokenizer is not that of the training, or does not fit the model.
    """
    tokenizer = load_tokenizer(BaseSource(str(folder)))
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        message = f"{folder}: the tokenizer's largest id is {largest}, the model has {num_embeddings} embeddings"
        if not own:
            raise ModelError(f"{message}: the tokenizer of another model; restore the right one")
        logger.warning(f"{message}; a text with such an id will fail")
    if not provenance.get("prompt"):
        try:
            return PromptBuilder(tokenizer, **PromptSection().model_dump())
        except TrsrError:
            return None
    builder = PromptBuilder(tokenizer, **provenance["prompt"])
    check_answers(str(folder), builder, provenance)
    return builder
