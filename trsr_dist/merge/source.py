"""What a path given by the user stands for, and the adapter and provenance it leads to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trsr_dist.errors import CheckpointError, ModelError
from trsr_dist.files import read_json, sha256_of
from trsr_dist.merge.adapter import CONFIG, Adapter, read_adapter
from trsr_dist.merge.engine_checkpoint import find_engine_folder, read_engine_adapter
from trsr_dist.run import MANIFEST

PROVENANCE = "provenance.json"
POINTERS = ("latest", "best")
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
        """The adapter folder, where it brings a tokenizer of its own."""
        return self.folder if any((self.folder / name).is_file() for name in TOKENIZER_FILES) else None


def find_source(path: Path) -> Source:
    """Resolve a checkpoint folder, a run folder or its ``latest`` or ``best``, an adapter or an engine checkpoint.

    Raises:
        CheckpointError: nothing that can be merged is there, or the checkpoint is incomplete.
    """
    folder = _follow(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a checkpoint, a run, or a PEFT adapter folder")
    if (folder / "adapter" / CONFIG).is_file():
        return _checkpoint(folder)
    if (folder / CONFIG).is_file() and any(folder.glob("adapter_model.*")):
        return Source("adapter", folder, _provenance(folder), lambda: read_adapter(folder))
    engine = find_engine_folder(folder)
    if engine is not None:
        return Source("engine", engine, _provenance(folder), lambda: read_engine_adapter(engine))
    if (folder / "config.json").is_file():
        if "merge" in _provenance(folder):
            return Source("merged", folder, _provenance(folder), None)
        raise CheckpointError(f"{folder}: a plain model folder without an adapter; there is nothing to merge")
    raise CheckpointError(
        f"{folder}: neither a checkpoint (adapter/{CONFIG}), nor a PEFT adapter ({CONFIG}), nor a DeepSpeed checkpoint"
    )


def _follow(path: Path) -> Path:
    """The checkpoint that a run folder, a checkpoints folder, or a pointer file names."""
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.is_dir() and (path / "latest").is_file() and any(path.glob("step-*")):
        path = path / "latest"
    if path.name in POINTERS and path.is_file():
        name = path.read_text(encoding="utf-8").strip()
        if not name or not (path.parent / name).is_dir():
            raise CheckpointError(
                f"{path}: names {name!r}, which is not in {path.parent}; name a step-* folder instead"
            )
        return path.parent / name
    if path.name == "checkpoints" and path.is_dir():
        raise CheckpointError(f"{path}: holds no complete checkpoint yet; train first")
    return path


def _checkpoint(folder: Path) -> Source:
    """A checkpoint folder of this project.

    Raises:
        CheckpointError: its manifest is missing, or a file of the adapter is not the recorded one.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}: it was not written to its end; choose an earlier checkpoint")
    files = read_json(folder / MANIFEST).get("files", {})
    for name, recorded in files.items():
        if not name.startswith("adapter/") and name != PROVENANCE:
            continue
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded["size"] or sha256_of(path) != recorded["sha256"]:
            raise CheckpointError(
                f"{path}: missing, truncated or changed since it was written; choose another checkpoint"
            )
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    adapter = folder / "adapter"
    return Source("checkpoint", folder, _provenance(folder), lambda: read_adapter(adapter), run)


def _provenance(folder: Path) -> dict[str, Any]:
    return read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}


@dataclass(frozen=True, slots=True)
class BaseName:
    """Where the base comes from and what it was in training."""

    name_or_path: str
    revision: str
    fingerprint: str
    """Empty where the source records none."""


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


def base_folder(base: BaseName, source: Source) -> Path:
    """The base's local folder; a hub model is fetched (weights, config, tokenizer) into the hub cache first.

    Raises:
        ModelError: it is neither here nor on the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    candidates = [Path(base.name_or_path)]
    if source.run is not None:
        # A run folder that was moved keeps its own base beside its checkpoints.
        candidates.append(source.run / Path(base.name_or_path).name)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    try:
        return Path(
            snapshot_download(
                base.name_or_path,
                revision=base.revision or None,
                allow_patterns=[
                    "*.json",
                    "*.safetensors",
                    "*.jinja",
                    "*.model",
                    "*.txt",
                    "*.tiktoken",
                    "LICENSE*",
                    "NOTICE*",
                ],
            )
        )
    except (HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"base {base.name_or_path!r}: no such folder, and not from the hub either ({str(error).splitlines()[0]}); "
            "name the base's folder with --base"
        ) from None
