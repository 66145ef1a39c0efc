"""DeepSpeed's config: mechanics from the file, everything else from the run's config. Pure."""

from __future__ import annotations

import json
from typing import Any

from trsr_dist.config.zero import OFFLOADS
from trsr_dist.planning.memory import ZeroSetting


def zero_setting(settings: dict[str, Any]) -> ZeroSetting:
    """Stage and offloading of a DeepSpeed config."""
    zero = settings["zero_optimization"]
    devices = [zero.get(key, {}).get("device", "none") for key in OFFLOADS]
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
        for key in OFFLOADS:
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
