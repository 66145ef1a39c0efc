"""What a path given by the user stands for, and the adapter and provenance it leads to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trsr_dist.bases import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, CONFIG, BaseName
from trsr_dist.errors import CheckpointError, ModelError
from trsr_dist.merge.adapter import check_mergeable
from trsr_dist.merge.engine_checkpoint import find_engine_folder, read_engine_adapter
from trsr_dist.model.adapters import Adapter, read_adapter, read_adapter_config
from trsr_dist.model.places import check_checkpoint, follow, is_checkpoint, read_provenance, run_of

WEIGHTS = (ADAPTER_WEIGHTS, ADAPTER_PICKLE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be merged."""

    kind: Literal["checkpoint", "adapter", "engine", "merged"]
    folder: Path
    provenance: dict[str, Any]
    """Of the checkpoint; empty for an adapter from elsewhere."""
    read: Callable[[], Adapter] | None
    """Reads and checks the adapter; None for a merged folder."""
    run: Path | None = None
    """The run folder around the checkpoint."""

    @property
    def tokenizer(self) -> Path | None:
        """The adapter folder, where it brings its own tokenizer."""
        return self.folder if any((self.folder / name).is_file() for name in TOKENIZER_FILES) else None


def find_source(path: Path) -> Source:
    """Resolve a checkpoint folder, a run folder or its ``latest`` or ``best``, an adapter or an engine checkpoint.

    Raises:
        CheckpointError: nothing that can be merged is there, or the checkpoint is incomplete.
    """
    folder = follow(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a checkpoint, a run, or a PEFT adapter folder")
    if is_checkpoint(folder):
        return _checkpoint(folder)
    if (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS):
        return Source("adapter", folder, read_provenance(folder), lambda: _read(folder))
    engine = find_engine_folder(folder)
    if engine is not None:
        return Source("engine", engine, read_provenance(folder), lambda: read_engine_adapter(engine))
    if (folder / CONFIG).is_file():
        if "merge" in read_provenance(folder):
            return Source("merged", folder, read_provenance(folder), None)
        raise CheckpointError(f"{folder}: a plain model folder without an adapter; there is nothing to merge")
    raise CheckpointError(
        f"{folder}: neither a checkpoint (adapter/{ADAPTER_CONFIG}), nor a PEFT adapter ({ADAPTER_CONFIG}), nor a "
        "DeepSpeed checkpoint"
    )


def _checkpoint(folder: Path) -> Source:
    check_checkpoint(folder)
    adapter = folder / "adapter"
    return Source("checkpoint", folder, read_provenance(folder), lambda: _read(adapter), run_of(folder))


def _read(folder: Path) -> Adapter:
    path = folder / ADAPTER_CONFIG
    check_mergeable(path, read_adapter_config(path))
    return read_adapter(folder)


def base_of(source: Source, adapter: Adapter, override: str | None) -> BaseName:
    """The base that ``--base``, the provenance or the adapter's config names, in this order.

    Raises:
        ModelError: none does.
    """
    recorded = source.provenance.get("base", {})
    fingerprint = recorded.get("fingerprint") or ""
    if override:
        return BaseName(override, "", fingerprint)
    name = recorded.get("name_or_path") or adapter.config.base_model_name_or_path
    if not name:
        raise ModelError(f"{source.folder}: names no base model; name it with --base")
    return BaseName(name, recorded.get("revision") or adapter.config.revision or "", fingerprint)
