"""Which model a folder holds, for the files that depend on it."""

from __future__ import annotations

from pathlib import Path

from trsr_dist.files import sha256_of
from trsr_dist.model.fingerprint import base_fingerprint
from trsr_dist.run import MANIFEST, manifest_hash

ADAPTER = "adapter_model.safetensors"


def model_identity(name_or_path: str) -> str:
    """A hash of a checkpoint, adapter or model folder; the name itself for a model of the hub.

    Raises:
        ModelError: a local folder holds no model.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return name_or_path
    if (folder / "adapter").is_dir() and (folder / MANIFEST).is_file():
        return manifest_hash(folder)
    if (folder / ADAPTER).is_file():
        return sha256_of(folder / ADAPTER)
    return base_fingerprint(folder)
