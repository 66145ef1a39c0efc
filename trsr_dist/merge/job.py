"""Merge one checkpoint into one Hugging Face folder, or say why not."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trsr_dist.errors import ModelError, RunError
from trsr_dist.files import atomic_folder, read_json, write_json
from trsr_dist.hashing import digest
from trsr_dist.log import get_logger
from trsr_dist.merge.adapter import Adapter, adapter_facts, adapter_hash, find_changes, write_adapter
from trsr_dist.merge.card import model_card
from trsr_dist.merge.companions import adapt_config, copy_companions
from trsr_dist.merge.guards import STAGE, check_base, check_output, check_space, resolve_prompt, tidy
from trsr_dist.merge.plan import MergePlan, check_targets, check_vocabulary, make_plan, tied_tensors
from trsr_dist.merge.source import PROVENANCE, BaseName, Source, base_folder, base_of, find_source
from trsr_dist.merge.stream import write_weights
from trsr_dist.merge.tensors import folder_entries
from trsr_dist.merge.verify import check_weights
from trsr_dist.model.fingerprint import base_fingerprint
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import folder_lock, is_finished, write_manifest

logger = get_logger("merge")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest log-odds difference that is accepted, by the output's dtype."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


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


def merge(checkpoint: Path, output: Path, options: MergeOptions) -> None:
    """Merge ``checkpoint`` into ``output``; a finished merge with the same inputs and settings is left alone.

    Raises:
        TrsrError: an input is damaged or does not fit, the result is not equal, or there is no room. Nothing is left
            behind then, and an older output stays.
    """
    source = find_source(checkpoint)
    if source.kind == "merged":
        logger.info(f"{source.folder}: already a merged model; nothing to do")
        return
    adapter = source.read()
    settings = {"dtype": options.dtype, "max_shard_bytes": options.max_shard_bytes, "only": options.adapter_only}
    base_name = base_of(source, adapter, options.base)
    base = base_folder(base_name, source)
    fingerprint = base_fingerprint(base)
    check_output(output, [source.folder, base], options.force)
    with folder_lock(output):
        tidy(output)
        inputs = {"adapter": adapter_hash(adapter), "base": fingerprint}
        if is_finished(output, settings, inputs, options.force):
            logger.info(f"{output}: merged already, with the same inputs and settings; nothing to do")
            return
        prepared = prepare(source, adapter, base_name, base, fingerprint, options)
        if options.dry_run:
            logger.info(f"would write {prepared.plan.num_bytes / 1e9:.2f} GB in {len(prepared.plan.files)} files")
            return
        try:
            _write(output, prepared, options, settings, inputs)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise RunError(f"{output}: the disk is full; make room or choose another --output") from None
    logger.info(f"wrote {output}")


def prepare(
    source: Source, adapter: Adapter, base_name: BaseName, base: Path, fingerprint: str, options: MergeOptions
) -> Inputs:
    """Check that adapter, base and tokenizer fit together, and plan the output."""
    check_base(base, base_name.fingerprint, fingerprint)
    if read_json(base / "config.json").get("quantization_config"):
        raise ModelError(f"{base}: a quantized model; name its unquantized original with --base")
    by_file = folder_entries(base)
    entries = {entry.name: entry for entries in by_file for entry in entries}
    tied = tied_tensors(base)
    changes = find_changes(adapter)
    check_targets(adapter.config, set(entries) | set(tied), changes)
    num_embeddings = check_vocabulary(base, list(entries.values()))
    dtype = DTYPES.get(options.dtype)
    keep_tied = bool(adapter.config.ensure_weight_tying)
    plan = make_plan(by_file, changes, tied, keep_tied, dtype, options.max_shard_bytes)
    builder = resolve_prompt(source.tokenizer or base, source.tokenizer is None, num_embeddings, source.provenance)
    changed = sum(output.change is not None for output in plan.outputs)
    logger.info(
        f"{source.kind} {source.folder.name}: {len(changes)} changes, {adapter.num_bytes / 1e6:.1f} MB of adapter; "
        f"base {base_name.name_or_path}: {len(entries)} tensors, {changed} of {len(plan.outputs)} written are changed"
    )
    main_dtype = dtype or max(entries.values(), key=lambda entry: entry.num_bytes).dtype
    return Inputs(source, adapter, base_name, base, fingerprint, plan, builder, main_dtype)


def _write(
    output: Path, inputs: Inputs, options: MergeOptions, settings: dict[str, Any], hashes: dict[str, str]
) -> None:
    check_space(output, inputs.adapter.num_bytes if options.adapter_only else inputs.plan.num_bytes)
    provenance = make_provenance(inputs, options)
    with atomic_folder(output) as folder:
        if options.adapter_only:
            write_adapter(inputs.adapter, folder, inputs.base_name.name_or_path)
        else:
            copy_companions(inputs.base, inputs.tokenizer, folder)
            adapt_config(folder, inputs.plan.unties, DTYPES.get(options.dtype))
            write_weights(folder, inputs.plan)
            provenance["merge"]["verification"] = _verify(folder, inputs, options)
        (folder / "README.md").write_text(model_card(provenance, _metrics(inputs.source)), encoding="utf-8")
        write_json(folder / PROVENANCE, provenance)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        write_manifest(folder, STAGE, settings, hashes, files=files)


def _verify(folder: Path, inputs: Inputs, options: MergeOptions) -> dict[str, Any]:
    """Read-back always; scores too where asked for or where memory allows."""
    weights = check_weights(folder, inputs.plan)
    logger.info(
        f"read back: {weights.num_changed} changed tensors equal base + adapter to {weights.largest_relative:.2g} of "
        f"their rows' largest value; {weights.num_copied} tensors are the base's bytes"
    )
    return {"weights": weights.to_dict()}


def make_provenance(inputs: Inputs, options: MergeOptions) -> dict[str, Any]:
    """The checkpoint's provenance, completed for adapters from elsewhere, with the facts of this merge."""
    recorded, builder = inputs.source.provenance, inputs.builder
    base = {
        "name_or_path": inputs.base_name.name_or_path,
        "revision": inputs.base_name.revision,
        "fingerprint": inputs.fingerprint,
    }
    prompt = {"prompt": builder.settings, "answer_ids": list(builder.answer_ids)} if builder is not None else {}
    facts = {
        "source": f"{inputs.source.kind} {inputs.source.folder.name}",
        "adapter_only": options.adapter_only,
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "untied_embeddings": inputs.plan.unties,
        "changed_tensors": sum(output.change is not None for output in inputs.plan.outputs),
        "config_hash": digest(read_json(inputs.base / "config.json")),
        "adapter": adapter_facts(inputs.adapter),
    }
    return {**recorded, "base": base, **prompt, "merge": facts}


def _metrics(source: Source) -> dict[str, Any] | None:
    """The run's own evaluation, the test split before the validation split."""
    if source.run is None:
        return None
    paths = (source.run / "evaluation" / f"{split}.json" for split in ("test", "valid"))
    return next((read_json(path) for path in paths if path.is_file()), None)
