"""Folders of base models: found here or fetched from the hub, and checked before any library reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsr_dist.errors import DataError, ModelError
from trsr_dist.files import explain, read_json
from trsr_dist.weights import folder_entries, has_weights

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
ORIGIN = "MODEL.json"
"""Beside a fetched base: the hub id it was made from."""
BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*"]
CODE_FILES = ["*.py"]
SECOND_COPIES = ["consolidated*", "original/*"]
"""The weights once more, in the form of the model's authors."""
LAYERS = ("num_hidden_layers", "n_layer")
"""Keys of config.json, by architecture."""


@dataclass(frozen=True, slots=True)
class BaseName:
    """Where the base comes from and what it was in training."""

    name_or_path: str
    revision: str
    fingerprint: str
    """Empty where the source records none."""


def is_path(name: str) -> bool:
    """Whether a model's name can only be a path: a hub id is a name, or owner/name."""
    return Path(name).is_absolute() or name.startswith(".") or len(Path(name).parts) > 2


def base_folder(base: BaseName, run: Path | None, remedy: str, with_code: bool = False) -> Path:
    """The base's local folder, checked; a hub model is fetched (weights, config, tokenizer) into the hub cache first.

    Args:
        base: which.
        run: the run folder of a checkpoint that names it.
        remedy: how this command is told another base; ends the error.
        with_code: fetch the model's own code too (``model.trust_remote_code``).

    Raises:
        ModelError: it is neither here nor on the hub, or is not a complete base.
    """
    candidates = [Path(base.name_or_path)]
    if run is not None:
        # A run folder that was moved keeps its own base beside its checkpoints.
        candidates.append(run / Path(base.name_or_path).name)
    with readable(base.name_or_path):
        for folder in candidates:
            if (folder / CONFIG).is_file() or (folder / ADAPTER_CONFIG).is_file():
                check_base(folder)
                return folder
        if is_path(base.name_or_path) or candidates[0].is_dir():
            found = f"no {CONFIG} in it" if candidates[0].is_dir() else "no such model folder"
            raise ModelError(f"base {base.name_or_path!r}: {found}; {remedy}")
        folder = fetch(base, remedy, BASE_FILES + CODE_FILES if with_code else BASE_FILES)
    check_base(folder)
    return folder


def fetch(base: BaseName, remedy: str, wanted: Sequence[str]) -> Path:
    """The folder of the hub cache with these files of a model or adapter, fetched where they are missing.

    Raises:
        ModelError: the hub has no such model, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        revision = base.revision or None
        return Path(
            snapshot_download(
                base.name_or_path, revision=revision, allow_patterns=list(wanted), ignore_patterns=SECOND_COPIES
            )
        )
    except (HFValidationError, OSError, ValueError) as error:
        raise ModelError(
            f"base {base.name_or_path!r}: no such folder, and not from the hub either ({str(error).splitlines()[0]}); "
            f"{remedy}"
        ) from None


def hub_file(name: str, revision: str, file: str) -> Path | None:
    """A file of a model or adapter, from the hub or its cache; None where it is not, or neither can be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except (HFValidationError, OSError, ValueError):
        return None


def check_base(folder: Path) -> None:
    """What every command asks of a base before it is read. Takes milliseconds whatever the size.

    Raises:
        ModelError: it holds an adapter, its config is damaged, or its weights are no sound safetensors.
    """
    read_model_config(folder)
    with readable(folder):
        folder_entries(folder)


def read_model_config(folder: Path) -> dict[str, Any]:
    """Content of a base's config.json.

    Raises:
        ModelError: missing, damaged or of no model; or an adapter lies beside it: transformers would put that into the
            model without a word.
    """
    with readable(folder):
        if (folder / ADAPTER_CONFIG).exists():
            raise ModelError(
                f"{folder}: holds {ADAPTER_CONFIG}, so it is an adapter, or a base with an adapter in it; name a base "
                "without one: merge the adapter first (tools/merge_lora.py), start from it (train.init_adapter), or "
                "move its files to a separate folder"
            )
        try:
            config = read_json(folder / CONFIG, finite=False)
        except DataError as error:
            raise ModelError(f"{error}: a model's config is needed; name a complete model folder") from None
    if not isinstance(config.get("model_type"), str) and not isinstance(config.get("auto_map"), dict):
        raise ModelError(f"{folder / CONFIG}: names no model_type, so it is no model's config; restore it")
    for key in LAYERS:
        if key in config and (type(config[key]) is not int or config[key] < 1):
            raise ModelError(f"{folder / CONFIG}: {key} is {config[key]!r}, expected 1 or more; restore the file")
    return config


def adapter_file(folder: Path) -> Path:
    """The file that PEFT reads an adapter's tensors from.

    Raises:
        ModelError: there is none, or the folder holds a whole model too, so that it is unclear what is meant.
    """
    with readable(folder):
        if has_weights(folder):
            raise ModelError(
                f"{folder}: holds an adapter ({ADAPTER_CONFIG}) and the weights of a model; move the adapter's files "
                "to a folder of their own and name that, or the base without them"
            )
        for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE):
            if (folder / name).is_file():
                return folder / name
    raise ModelError(f"{folder}: no {ADAPTER_WEIGHTS}; the adapter is incomplete, copy it again")


@contextmanager
def readable(place: str | Path) -> Iterator[None]:
    """Files that the system does not let this process read become an error that a user can fix.

    Raises:
        ModelError: names the file and what the system found.
    """
    try:
        yield
    except OSError as error:
        raise ModelError(str(explain(error, place))) from None
