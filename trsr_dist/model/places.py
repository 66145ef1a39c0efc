"""What a path to a model stands for: pointers, checkpoints, provenance, and the base that an adapter belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trsr_dist.errors import CheckpointError, ModelError
from trsr_dist.files import read_json, sha256_of
from trsr_dist.run import MANIFEST, Manifest, read_manifest

PROVENANCE = "provenance.json"
ADAPTER_CONFIG = "adapter_config.json"
POINTERS = ("latest", "best")
BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*"]
CODE_FILES = ["*.py"]
SECOND_COPIES = ["consolidated*", "original/*"]
"""The weights once more, in the form of the model's authors."""


class FileFacts(TypedDict):
    """What a checkpoint's manifest says of a file."""

    size: int
    sha256: str


class CheckpointManifest(Manifest):
    """Files by their paths in the checkpoint."""

    files: dict[str, FileFacts]


def follow(path: Path) -> Path:
    """The checkpoint that a run folder, a checkpoints folder, or a pointer file names; other paths stay.

    Raises:
        CheckpointError: it names none.
    """
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


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of this project."""
    return (folder / "adapter" / ADAPTER_CONFIG).is_file()


def check_checkpoint(folder: Path) -> None:
    """A checkpoint must be complete, its adapter and provenance as they were written.

    Raises:
        CheckpointError: its manifest is missing, or a file is not the recorded one.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}: it was not written to its end; choose an earlier checkpoint")
    files = read_manifest(folder, CheckpointManifest)["files"]
    for name, recorded in files.items():
        if not name.startswith("adapter/") and name != PROVENANCE:
            continue
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded["size"] or sha256_of(path) != recorded["sha256"]:
            raise CheckpointError(
                f"{path}: missing, truncated or changed since it was written; choose another checkpoint"
            )


def read_provenance(folder: Path) -> dict[str, Any]:
    """Content of provenance.json; empty where there is none."""
    return read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}


def run_of(checkpoint: Path) -> Path | None:
    """The run folder around a checkpoint."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


@dataclass(frozen=True, slots=True)
class BaseName:
    """Where the base comes from and what it was in training."""

    name_or_path: str
    revision: str
    fingerprint: str
    """Empty where the source records none."""


def base_folder(base: BaseName, run: Path | None, remedy: str, with_code: bool = False) -> Path:
    """The base's local folder; a hub model is fetched (weights, config, tokenizer) into the hub cache first.

    Args:
        base: which.
        run: the run folder of a checkpoint that names it.
        remedy: how this command is told another base; ends the error.
        with_code: fetch the model's own code too (``model.trust_remote_code``).

    Raises:
        ModelError: it is neither here nor on the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    candidates = [Path(base.name_or_path)]
    if run is not None:
        # A run folder that was moved keeps its own base beside its checkpoints.
        candidates.append(run / Path(base.name_or_path).name)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    if Path(base.name_or_path).is_absolute():
        raise ModelError(f"base {base.name_or_path!r}: no such model folder; {remedy}")
    try:
        wanted = BASE_FILES + CODE_FILES if with_code else BASE_FILES
        revision = base.revision or None
        return Path(
            snapshot_download(
                base.name_or_path, revision=revision, allow_patterns=wanted, ignore_patterns=SECOND_COPIES
            )
        )
    except (HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"base {base.name_or_path!r}: no such folder, and not from the hub either ({str(error).splitlines()[0]}); "
            f"{remedy}"
        ) from None
