"""Weights and Adam's moments as whole float32 tensors, out of and into any ZeRO stage and number of ranks.

DeepSpeed's own checkpoints load on the same number of ranks only. LoRA states are small: gathered they are a few
megabytes, and know nothing of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from trsr_dist.distributed import on_rank_zero
from trsr_dist.errors import CheckpointError
from trsr_dist.files import writing
from trsr_dist.train.checkpoints import CheckpointFolder, TrainerState
from trsr_dist.train.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"


def gather_state(engine: Engine, is_kept: bool = True) -> dict[str, torch.Tensor]:
    """Float32 master weights and moments, whole, on the CPU. All ranks call it.

    Args:
        engine: whose state is gathered.
        is_kept: False: this rank takes part in the gathering only, and copies nothing.

    Returns:
        By ``weight/NAME``, ``exp_avg/NAME`` and ``exp_avg_sq/NAME``; empty where it is not kept. Moments are 0 before
        the first step.
    """
    state = {}
    for name, parameter in engine.trainable().items():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        for kind in (WEIGHT, *MOMENTS):
            value = _read(engine, parameter, kind)
            if not is_kept:
                continue
            value = torch.zeros(shape) if value is None else value
            state[f"{kind}/{name}"] = value.detach().to("cpu", torch.float32, copy=True).reshape(shape)
    return state


class Saving:
    """Writes checkpoints of one engine behind the next steps, in a thread of rank 0: one at a time, in order.

    Args:
        engine: whose state is saved.
        checkpoints: where to.
        is_main: whether this is rank 0.
        adapter_config: content of ``adapter_config.json``.
        provenance: from a state to what a later stage must know.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoints: CheckpointFolder,
        is_main: bool,
        adapter_config: dict[str, Any],
        provenance: Callable[[TrainerState], dict[str, Any]],
    ) -> None:
        self._engine = engine
        self._checkpoints = checkpoints
        self._is_main = is_main
        self._adapter_config = adapter_config
        self._provenance = provenance
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.write_seconds = 0.0
        """The longest that rank 0 has written on one."""

    def save(self, state: TrainerState) -> None:
        """Copy the state to host memory; writing it goes on when this returns. All ranks call it.

        Raises:
            TrsrError: as ``wait``, of the checkpoint before this one.
        """
        self.wait()
        tensors = gather_state(self._engine, self._is_main)
        if self._is_main:
            self._pending = self._writer.submit(self._write, tensors, state)

    def wait(self) -> None:
        """Until the last checkpoint is there. All ranks call it; a problem of rank 0 is raised on all of them.

        Raises:
            CheckpointError: what was read back is not what was written.
            RunError: the disk is full, or the folder was lost to another process. The checkpoints before it are intact.
        """
        pending, self._pending = self._pending, None
        on_rank_zero(lambda: pending and pending.result())

    @property
    def has_failed(self) -> bool:
        """Whether ``wait`` would raise; on rank 0, of what has ended by now."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def close(self) -> None:
        """Let this process's writing end, well or not: the folder's lock is given up after it."""
        self._writer.shutdown()

    def _write(self, tensors: dict[str, torch.Tensor], state: TrainerState) -> None:
        started = time.perf_counter()
        with writing(self._checkpoints.root):
            self._checkpoints.save(tensors, state, self._adapter_config, self._provenance(state))
            if state.best_step == state.step:
                self._checkpoints.mark_best(state.step)
        self.write_seconds = max(self.write_seconds, time.perf_counter() - started)


def restore_state(engine: Engine, state: dict[str, torch.Tensor], step: int) -> None:
    """Set master weights, working copies and moments. All ranks call it with equal values.

    Args:
        engine: freshly built.
        state: of ``gather_state``.
        step: optimizer steps that the state has seen, for Adam's bias correction.

    Raises:
        CheckpointError: names or shapes are not this model's.
    """
    check_names(engine, state)
    _prime(engine, step)
    for name, parameter in engine.trainable().items():
        for kind in (WEIGHT, *MOMENTS):
            _write(engine, parameter, kind, state[f"{kind}/{name}"])


def start_from(engine: Engine, weights: dict[str, torch.Tensor]) -> None:
    """Set the weights of a training that begins. All ranks call it with equal values.

    Args:
        engine: freshly built.
        weights: by parameter name, float32.

    Raises:
        CheckpointError: names or shapes are not this model's.
    """
    zeros = {f"{kind}/{name}": torch.zeros_like(weight) for name, weight in weights.items() for kind in MOMENTS}
    restore_state(engine, {f"{WEIGHT}/{name}": weight for name, weight in weights.items()} | zeros, 0)


def check_names(engine: Engine, state: dict[str, torch.Tensor]) -> None:
    """The state must be of this model's trainable parameters.

    Raises:
        CheckpointError: names the first difference.
    """
    expected = {
        f"{kind}/{name}": tuple(getattr(p, "ds_shape", p.shape))
        for name, p in engine.trainable().items()
        for kind in (WEIGHT, *MOMENTS)
    }
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else None
        if found != expected.get(name):
            raise CheckpointError(
                f"the adapter's {name} has shape {found}, this run's model {expected.get(name)}; go on with the lora.* "
                "settings of the adapter, or start a new run"
            )


def adam_step(engine: Engine) -> int:
    """Optimizer steps that Adam has counted; 0 before the first."""
    return next((int(entry["step"]) for entry in engine.adam.state.values() if "step" in entry), 0)


def _flat_masters(engine: Engine) -> list[torch.Tensor] | None:
    """This rank's flat float32 partitions, which AdamW updates; None at stage 0."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(engine.zero_optimizer, attribute):
            return list(getattr(engine.zero_optimizer, attribute))
    return None


def _read(engine: Engine, parameter: nn.Parameter, kind: str) -> torch.Tensor | None:
    if engine.stage == 0:
        return parameter if kind == WEIGHT else engine.adam.state.get(parameter, {}).get(kind)
    if kind == WEIGHT:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind) if adam_step(engine) else None


def _write(engine: Engine, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    if engine.stage == 0:
        target = parameter.data if kind == WEIGHT else engine.adam.state[parameter][kind]
        target.copy_(value)
    elif engine.stage == 3:
        _write_partition(engine.zero_optimizer, parameter, value, None if kind == WEIGHT else kind)
    elif kind == WEIGHT:
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)  # DeepSpeed sets the master only
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _write_partition(optimizer: Any, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
    """Stage 3: set this rank's part. DeepSpeed's own function fails on the last rank's padded part."""
    part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    first = part.numel() * optimizer._get_param_partition_rank(parameter)
    share = value.flatten()[first : first + part.numel()]
    part.data[: share.numel()].copy_(share)
    if key is None:
        parameter.ds_tensor.data[: share.numel()].copy_(share)
        if parameter.data.numel() == value.numel():  # a small parameter that is whole on every rank
            parameter.data.copy_(value.reshape(parameter.data.shape))


def _prime(engine: Engine, step: int) -> None:
    """Create Adam's lazily made state, so that it can be set."""
    flat = _flat_masters(engine)
    for tensor in engine.trainable().values() if flat is None else flat:
        moments = {kind: torch.zeros_like(tensor.data) for kind in MOMENTS}
        engine.adam.state[tensor] = {"step": torch.tensor(float(step)), **moments}
    if hasattr(engine.zero_optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.zero_optimizer._hp_optimizer_states_linked = False
        engine.zero_optimizer._lazy_init_hp_params_optimizer_state()
