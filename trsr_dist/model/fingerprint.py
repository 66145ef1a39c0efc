"""A base model's identity: its config, the layout of its weights, and a sample of their bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trsr_dist.errors import ModelError
from trsr_dist.files import read_json

SAMPLE_BYTES = 4096
NUM_SAMPLES = 16
VOLATILE = ("_name_or_path", "transformers_version")
"""Keys of config.json that differ between copies of one model."""


def base_fingerprint(folder: str | Path, revision: str = "") -> str:
    """Hex digest of a local model folder, read in milliseconds whatever its size.

    Raises:
        ModelError: the folder has no config.json or no safetensors.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise ModelError(f"{folder}: no config.json or no safetensors; name a complete model folder")
    config = read_json(folder / "config.json", finite=False)
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    state = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            state.update(stream.read(8 + int.from_bytes(stream.read(8), "little")))
            for sample in range(NUM_SAMPLES):
                stream.seek(size * sample // NUM_SAMPLES)
                state.update(stream.read(SAMPLE_BYTES))
    return state.hexdigest()
