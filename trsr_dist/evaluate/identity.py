"""Which model a folder holds, for the files that depend on it."""

from __future__ import annotations

from pathlib import Path

from trsr_dist.files import sha256_of
from trsr_dist.hashing import digest
from trsr_dist.model.fingerprint import base_fingerprint
from trsr_dist.run import MANIFEST, manifest_hash

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


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
    if (folder / ADAPTER[0]).is_file():
        return digest([sha256_of(folder / name) for name in ADAPTER if (folder / name).is_file()])
    return base_fingerprint(folder)
