"""Everything that is read and checked before the first byte is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from trsr_dist.bases import BaseName
from trsr_dist.errors import ModelError
from trsr_dist.log import get_logger
from trsr_dist.merge.adapter import find_changes
from trsr_dist.merge.guards import resolve_prompt
from trsr_dist.merge.plan import MergePlan, make_plan
from trsr_dist.merge.source import Source
from trsr_dist.model.adapters import Adapter, attach
from trsr_dist.model.fingerprint import check_same_base
from trsr_dist.pretrained import BaseSource, declared_config, is_tied, load_config, read_structure
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.weights import folder_entries

logger = get_logger("merge")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What the command line asks for."""

    base: str | None = None
    """Folder or hub id; None: the one the checkpoint names."""
    adapter_only: bool = False
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    max_shard_bytes: int | None = None
    """None: the base's files."""
    verify: Literal["auto", "scores", "weights", "none"] = "auto"
    """auto: scores where memory allows, else weights."""
    tolerance: float | None = None
    """Largest log-odds difference; None: by dtype."""
    force: bool = False
    """Make an earlier merge again."""
    update: bool = False
    """Make it again if its checkpoint or settings have changed since."""
    dry_run: bool = False


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
    changes = find_changes(adapter)
    attach(structure.model, adapter)
    changes = {structure.stored(name, entries): change for name, change in changes.items()}
    tied = {structure.stored(one, entries): structure.stored(other, entries) for one, other in structure.tied.items()}
    dtype = DTYPES.get(options.dtype)
    keep_tied = bool(adapter.config.ensure_weight_tying)
    unties = is_tied(declared) and not is_tied(config)
    plan = make_plan(by_file, changes, tied, keep_tied, dtype, options.max_shard_bytes, unties)
    vocabulary = config.get_text_config().vocab_size
    builder = resolve_prompt(source.tokenizer or base, source.tokenizer is None, vocabulary, source.provenance)
    changed = sum(output.change is not None for output in plan.outputs)
    logger.info(
        f"{source.kind} {source.folder.name}: {len(changes)} changes, {adapter.num_bytes / 1e6:.1f} MB of adapter; "
        f"base {base_name.name_or_path}: {len(entries)} tensors, {changed} of {len(plan.outputs)} written are changed"
    )
    main_dtype = dtype or max(entries.values(), key=lambda entry: entry.num_bytes).dtype
    return Inputs(source, adapter, base_name, base, fingerprint, plan, builder, main_dtype)
