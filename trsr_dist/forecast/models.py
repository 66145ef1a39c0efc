"""A model's sizes from its config alone: no weights, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trsr_dist.errors import ModelError
from trsr_dist.files import read_json
from trsr_dist.planning.shape import ModelShape


def model_shape(name_or_path: str, revision: str = "") -> ModelShape:
    """Sizes of a local model or one of the hub, of which only config.json is fetched.

    Raises:
        ModelError: there is no config, or it lacks a size.
    """
    return ModelShape.from_config(read_config(name_or_path, revision))


def read_config(name_or_path: str, revision: str) -> dict[str, Any]:
    """Content of a model's config.json.

    Raises:
        ModelError: it is neither here nor on the hub.
    """
    path = Path(name_or_path) / "config.json"
    if path.is_file():
        return read_json(path, finite=False)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return read_json(hf_hub_download(name_or_path, "config.json", revision=revision or None), finite=False)
    except (HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"model {name_or_path!r}: no {path}, and not from the hub either ({str(error).splitlines()[0]})"
        ) from None
