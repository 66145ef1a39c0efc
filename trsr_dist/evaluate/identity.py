"""Which model a folder holds, for the files that depend on it."""

from __future__ import annotations

from pathlib import Path

from trsr_dist.bases import ADAPTER_CONFIG
from trsr_dist.files import sha256_of
from trsr_dist.hashing import digest
from trsr_dist.model.adapters import adapter_file
from trsr_dist.model.fingerprint import base_fingerprint
from trsr_dist.run import MANIFEST, manifest_hash


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
