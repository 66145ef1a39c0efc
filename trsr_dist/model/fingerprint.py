"""A base model's identity: its config, the layout of its weights, and a sample of their bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trsr_dist.bases import check_base, read_model_config
from trsr_dist.errors import ModelError

SAMPLE_BYTES = 4096
NUM_SAMPLES = 16
VOLATILE = ("_name_or_path", "transformers_version")
"""Keys of config.json that differ between copies of one model."""


def base_fingerprint(folder: str | Path) -> str:
    """Hex digest of a local model folder, read in milliseconds whatever its size.

    Raises:
        ModelError: the folder is no complete base.
    """
    folder = Path(folder)
    check_base(folder)
    files = sorted(folder.glob("*.safetensors"))
    config = read_model_config(folder)
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    state = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            state.update(stream.read(min(size, 8 + int.from_bytes(stream.read(8), "little"))))
            for sample in range(NUM_SAMPLES):
                stream.seek(size * sample // NUM_SAMPLES)
                state.update(stream.read(SAMPLE_BYTES))
    return state.hexdigest()


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
