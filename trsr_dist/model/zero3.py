"""A frozen base under ZeRO-3: every rank reads, and holds, its share of each weight only.

transformers reads all weights into the memory of rank 0 and sends them round. Here the model is made empty and
divided, then each rank reads its rows of the safetensors files: the ranks of a node read every file once together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.initialization import no_init_weights

from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.log import get_logger
from trsr_dist.weights import named_entries

log = get_logger("model")


def load_divided(
    folder: Path, build: Callable[[], nn.Module], zero_config: dict[str, Any]
) -> tuple[nn.Module, int] | None:
    """Load a base from a local folder; None where its files do not name the model's own weights.

    Args:
        folder: of safetensors.
        build: makes the model; its weights are left unset.
        zero_config: DeepSpeed's, with stage 3.

    Returns:
        The model, its weights divided over the ranks, and the bytes that this rank has read.

    Raises:
        ModelError: a tensor has another shape than the config says, or a file cannot be read.
    """
    skip_shared_memory_operator()
    stored = named_entries(folder)
    with empty_and_divided(zero_config):
        model = build()
    model.tie_weights()
    parameters = dict(model.named_parameters())
    missing = sorted(parameters.keys() - stored.keys())
    if missing:
        log.info("%s: %s is stored under another name; rank 0 reads all", folder, missing[0])
        return None
    num_bytes = 0
    by_file: dict[Path, list[str]] = {}
    for name in parameters:
        by_file.setdefault(stored[name].file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    num_bytes += _fill(parameters[name], tensors, name, file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read ({error}); copy it again") from None
    return model, num_bytes


def scoring_engine(model: nn.Module, zero_config: dict[str, Any]) -> nn.Module:
    """DeepSpeed around a divided model that is not trained: each layer's weights are gathered while it runs.

    All ranks call it, and all make their forward passes together.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=zero_config)
    engine.eval()
    return engine


def scoring_config(settings: dict[str, Any], precision: str, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's config for a model that is not trained.

    Args:
        settings: of a file of ``ds_configs/`` with stage 3.
        precision: float32 or bfloat16.
        on_gpu: False: without what needs CUDA.
    """
    kept = ("stage", "offload_param", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    kept += ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    zero = {key: value for key, value in settings["zero_optimization"].items() if key in kept}
    if not on_gpu and "offload_param" in zero:
        zero["offload_param"] = zero["offload_param"] | {"pin_memory": False}
    bf16 = {"enabled": precision == "bfloat16"}
    return {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "bf16": bf16, "steps_per_print": None}


def check_equal_calls(backend: str | None, world_size: int) -> None:
    """Ranks that divide a model must call it equally often, since they gather each layer's weights together.

    Args:
        backend: of the shared-prefix attention: a row is one call. None: as many as its prompts need.
        world_size: number of ranks that divide the model.

    Raises:
        ConfigError: the number of calls depends on the row.
    """
    if backend is None and world_size > 1:
        raise ConfigError(
            f"ZeRO stage 3 on {world_size} ranks needs shared prefixes, which this model cannot have: take a stage "
            "below 3 (ds_configs/zero1.json), an architecture that is proven, or one rank"
        )


def skip_shared_memory_operator() -> None:
    """Keep DeepSpeed from compiling an operator for CPUs: it takes a minute and nothing here uses it."""
    import deepspeed  # noqa: F401

    # `import deepspeed.comm.torch as m` binds PyTorch's module of that name.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


@contextmanager
def empty_and_divided(zero_config: dict[str, Any]) -> Iterator[None]:
    """Within this context new models are divided over the ranks as they are made, their weights left unset."""
    from deepspeed import init_distributed, zero

    init_distributed(auto_mpi_discovery=False)  # else the config's batch is checked against a world of one
    with no_init_weights(), zero.Init(config_dict_or_path=zero_config):
        yield


@torch.no_grad()
def _fill(parameter: nn.Parameter, tensors: Any, name: str, file: Path) -> int:
    """Read this rank's share of a parameter; returns the bytes read."""
    stored = tensors.get_slice(name)
    shape = tuple(stored.get_shape())
    if shape != tuple(parameter.ds_shape):
        raise ModelError(f"{file}: {name} has shape {shape}, the config says {tuple(parameter.ds_shape)}")
    share = parameter.ds_tensor
    start = share.ds_numel * parameter.ds_process_group.rank()
    stop = min(start + share.ds_numel, parameter.ds_numel)
    if start >= stop:
        return 0
    width = parameter.ds_numel // shape[0]
    first, last = start // width, -(-stop // width)
    rows = stored[first:last]
    values = rows.flatten()[start - first * width : stop - first * width]
    share[: len(values)].copy_(values)
    return rows.nbytes
