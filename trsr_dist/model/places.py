"""What a path to a model stands for: pointers, checkpoints, provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trsr_dist.bases import ADAPTER_CONFIG
from trsr_dist.errors import CheckpointError
from trsr_dist.files import read_json, sha256_of
from trsr_dist.run import MANIFEST, Manifest, read_manifest

PROVENANCE = "provenance.json"
POINTERS = ("latest", "best")


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
