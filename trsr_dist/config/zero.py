"""Reads DeepSpeed's config files, which hold mechanics only. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trsr_dist.errors import ConfigError, DataError
from trsr_dist.files import read_text
from trsr_dist.json_text import parse_json

PACKAGE = Path(__file__).parents[1]
OWNED = {
    "train_batch_size": "train.rows_per_step",
    "train_micro_batch_size_per_gpu": "train.rows_per_step",
    "gradient_accumulation_steps": "train.rows_per_step",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_betas",
    "scheduler": "train.schedule and train.warmup_ratio",
    "tensorboard": "run.tensorboard",
    "steps_per_print": "train.log_every_steps",
}
"""Keys of a DeepSpeed config that have an owner in the run's config."""

OFFLOADS = ("offload_optimizer", "offload_param")


def find_file(name: str) -> Path:
    """A file named relative to the working folder, else one that is shipped."""
    return Path(name) if Path(name).exists() else shipped_file(name)


def shipped_file(name: str) -> Path:
    """A file of ``configs/``, ``ds_configs/``, ``launch/`` or ``tools/``.

    A wheel has these folders inside the package, the repository beside it.
    """
    return PACKAGE / name if (PACKAGE / name).exists() else PACKAGE.parent / name


def read_zero_config(path: str | Path, key: str = "train.deepspeed_config") -> dict[str, Any]:
    """Read and check a file of ``ds_configs/``.

    Args:
        path: of the file.
        key: the setting that names it, for messages.

    Raises:
        ConfigError: missing, not JSON, without a ZeRO stage, with a value left open, or with a setting that the run's
            config owns.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise ConfigError(f"{key}={path}: no such file; the shipped ones are named such as ds_configs/zero1.json")
    try:
        settings = parse_json(read_text(path), object, unique=True)
    except (DataError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{key}={path}: {str(error).removeprefix(f'{path}: ')}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise ConfigError(f"{path}: expected an object that holds an object 'zero_optimization'")
    for name in settings:
        if name in OWNED:
            raise ConfigError(f"{path}: {name!r} has its owner in the run's config: set {OWNED[name]}, remove it here")
    for name, value in settings.get("zero_optimization", {}).items():
        if value is None or value == "auto" or (name in OFFLOADS and not isinstance(value, dict)):
            expected = 'an object such as {"device": "cpu"}' if name in OFFLOADS else "a value"
            raise ConfigError(f"{path}: zero_optimization.{name} is {value!r}, expected {expected}; or leave it out")
    stage = settings.get("zero_optimization", {}).get("stage")
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    return settings
