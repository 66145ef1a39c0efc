"""DeepSpeed's config: mechanics from the file, everything else from the run's config. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trsr_dist.errors import ConfigError
from trsr_dist.planning.memory import ZeroSetting

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


def read_zero_config(path: str | Path) -> dict[str, Any]:
    """Read and check a file of ``ds_configs/``.

    Raises:
        ConfigError: missing, not JSON, without a ZeRO stage, or with a setting that the run's config owns.
    """
    path = Path(path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"train.deepspeed_config={path}: no such file; the shipped ones lie in ds_configs/") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    for key in settings:
        if key in OWNED:
            raise ConfigError(f"{path}: {key!r} has its owner in the run's config: set {OWNED[key]}, remove it here")
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    return settings


def zero_setting(settings: dict[str, Any]) -> ZeroSetting:
    """Stage and offloading of a DeepSpeed config."""
    zero = settings["zero_optimization"]
    devices = [zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")]
    return ZeroSetting(zero["stage"], devices[0] != "none", devices[1] != "none")


def complete_zero_config(
    settings: dict[str, Any], rows_per_rank: int, world_size: int, precision: str, max_grad_norm: float, on_gpu: bool
) -> dict[str, Any]:
    """The config that DeepSpeed gets.

    Args:
        settings: of ``read_zero_config``.
        rows_per_rank: of a step; each is a micro-batch.
        world_size: number of ranks.
        precision: float32 or bfloat16.
        max_grad_norm: 0: no clipping.
        on_gpu: False: without what needs CUDA.
    """
    zero = json.loads(json.dumps(settings["zero_optimization"]))
    if zero["stage"] == 0 and precision != "float32":
        # DeepSpeed's 16-bit optimizer without ZeRO starts Adam's bias correction a step late: it trains differently.
        zero["stage"] = 1
    if not on_gpu:
        zero["overlap_comm"] = False
        for key in ("offload_optimizer", "offload_param"):
            zero.get(key, {}).pop("pin_memory", None)
    return settings | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": rows_per_rank,
        "train_batch_size": rows_per_rank * world_size,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        # PyTorch's AdamW serves offloading too; DeepSpeed's own needs a compiler on every node.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
