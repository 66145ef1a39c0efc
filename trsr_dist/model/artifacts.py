"""The files of checkpoints, adapters and models: their names and pointers, provenance, fingerprints."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from typing_extensions import TypedDict

from trsr_dist.bases import ADAPTER_CONFIG, adapter_file, check_base, read_model_config
from trsr_dist.config.sections import PromptSection
from trsr_dist.errors import CheckpointError, ModelError
from trsr_dist.files import read_json, sha256_of
from trsr_dist.hashing import digest
from trsr_dist.json_text import describe_form
from trsr_dist.prompts.text import WORDINGS
from trsr_dist.run import MANIFEST, Manifest, manifest_hash, read_manifest
from trsr_dist.weights import folder_files

PROVENANCE = "provenance.json"
POINTERS = ("best", "latest")
"""Of a run, in this order: the best by ``train.best_metric`` where validations have named one."""
NAME_BYTES = 255
SAMPLE_BYTES = 4096
NUM_SAMPLES = 16
VOLATILE = ("_name_or_path", "transformers_version")
"""Keys of config.json that differ between copies of one model."""


class FileFacts(TypedDict):
    """What a checkpoint's manifest says of a file."""

    size: int
    sha256: str


class CheckpointManifest(Manifest):
    """Files by their paths in the checkpoint."""

    files: dict[str, FileFacts]


class BaseFacts(TypedDict, total=False):
    """The base of a training."""

    name_or_path: str
    revision: str
    fingerprint: str


class Provenance(TypedDict, total=False):
    """What a checkpoint or a model tells of its making, as far as it is read."""

    __pydantic_config__ = ConfigDict(extra="allow")
    base: BaseFacts
    prompt: dict[str, Any]
    answer_ids: list[int]
    domain: str
    shards: dict[str, str]
    train: dict[str, Any]
    config: dict[str, Any]
    merge: dict[str, Any]


def follow(path: Path) -> Path:
    """The checkpoint that a run folder, a checkpoints folder, or a pointer file names, or whose adapter folder this is.

    A folder names its ``best`` where there is one, else its ``latest``. Other paths stay.

    Raises:
        CheckpointError: it names none.
    """
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.is_dir() and any(path.glob("step-*")):
        path = next((path / name for name in POINTERS if (path / name).is_file()), path)
    if path.name in POINTERS and path.is_file():
        name = path.read_bytes()[:NAME_BYTES].decode(errors="replace").strip()
        if not name or Path(name).name != name or not (path.parent / name).is_dir():
            raise CheckpointError(
                f"{path}: names {name!r}, which is not in {path.parent}; name a step-* folder instead"
            )
        return path.parent / name
    if path.name == "adapter" and is_checkpoint(path.parent) and (path.parent / PROVENANCE).is_file():
        return path.parent  # which also knows the prompts of the training
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
    needed = {name: facts for name, facts in files.items() if name.startswith("adapter/") or name == PROVENANCE}
    if path := changed_file(folder, needed):
        raise CheckpointError(f"{path}: missing, truncated or changed since it was written; choose another checkpoint")


def changed_file(folder: Path, files: dict[str, FileFacts]) -> Path | None:
    """The first of a checkpoint's files that is not the recorded one, or is not there."""
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded["size"] or sha256_of(path) != recorded["sha256"]:
            return path
    return None


def read_provenance(folder: Path) -> dict[str, Any]:
    """Content of provenance.json; empty where there is none.

    Raises:
        DataError: it is damaged, or of another form.
        ModelError: the prompts' settings or wording are unknown here.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    values, remedy = read_json(path, Provenance), "restore the file, or update this package"
    if values.get("domain", "items") not in WORDINGS:
        raise ModelError(f"{path}: domain: {values['domain']!r}, expected one of {', '.join(WORDINGS)}; {remedy}")
    try:
        PromptSection.model_validate(values.get("prompt", {}))
    except ValidationError as error:
        raise ModelError(f"{path}: prompt: {describe_form(error)}; {remedy}") from None
    return values


def base_fingerprint(folder: str | Path) -> str:
    """A base's identity: its config, the layout of its weights, and a sample of their bytes.

    Returns:
        Hex digest of a local model folder, found in milliseconds whatever its size.

    Raises:
        ModelError: the folder is no complete base.
    """
    folder = Path(folder)
    check_base(folder)
    config = read_model_config(folder)
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    state = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for path in folder_files(folder):  # no second copies of the weights, which may come and go
        size = path.stat().st_size
        with open(path, "rb") as stream:
            state.update(stream.read(min(size, 8 + int.from_bytes(stream.read(8), "little"))))
            for sample in range(NUM_SAMPLES):
                stream.seek(size * sample // NUM_SAMPLES)
                state.update(stream.read(SAMPLE_BYTES))
    return state.hexdigest()


def model_identity(name_or_path: str, revision: str = "") -> str:
    """A hash of a checkpoint, adapter or model folder; name and revision of a model of the hub.

    Raises:
        ModelError: a local folder holds no model.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return f"{name_or_path}@{revision}" if revision else name_or_path
    if (folder / MANIFEST).is_file():  # of a checkpoint, or of a merged model: it holds the adapter's hash
        return manifest_hash(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return digest([sha256_of(adapter_file(folder)), sha256_of(folder / ADAPTER_CONFIG)])
    return base_fingerprint(folder)


def check_same_base(place: str | Path, found: str, recorded: str, remedy: str) -> None:
    """The base must be the one of a training.

    Args:
        place: of the base.
        found: its fingerprint.
        recorded: the training's; empty where none was recorded.
        remedy: ends the error.

    Raises:
        ModelError: they differ.
    """
    if recorded and recorded != found:
        raise ModelError(
            f"{place}: not the base of the training (fingerprint {found[:12]}..., trained on {recorded[:12]}...): "
            f"another one, or its files have changed; {remedy}"
        )


def run_of(checkpoint: Path) -> Path | None:
    """The run folder around a checkpoint."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write contiguous tensors as one safetensors file, as PyTorch's (``format: pt``).

    Raises:
        OSError: as of any other file. The library hides what the system said in its own type.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"(.*) \(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[2]), found[1], str(path)) from None
