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
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from trsr_dist.distributed import gather_objects, gather_on_rank_zero, is_rank_zero, on_rank_zero
from trsr_dist.errors import CheckpointError
from trsr_dist.files import writing
from trsr_dist.train.checkpoints import CheckpointFolder, TrainerState
from trsr_dist.train.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
Span = tuple[int, int]
"""Place of a rank's first value in a flattened parameter, and how many it holds."""


def gather_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Float32 master weights and moments, whole, on the CPU of rank 0. All ranks call it.

    Each rank sends all it holds of a kind in one piece: a collective for each tensor takes longer than the copy.

    Returns:
        By ``weight/NAME``, ``exp_avg/NAME`` and ``exp_avg_sq/NAME``; empty on the other ranks. Moments are 0 before the
        first step.

    Raises:
        CheckpointError: the ranks do not hold each value once.
    """
    spans = gather_objects([(first, len(share)) for first, share in _shares(engine, WEIGHT)])
    _check_spans(engine, spans)
    state = _gather(engine, WEIGHT, spans)
    for kind in MOMENTS:
        state |= _gather(engine, kind, spans) if adam_step(engine) else _zeros(state, kind)
    return state


class Saving:
    """Writes checkpoints of one engine behind the next steps, in a thread of rank 0: one at a time, in order.

    Args:
        engine: whose state is saved.
        checkpoints: where to.
        adapter_config: content of ``adapter_config.json``.
        provenance: from a state to what a later stage must know.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoints: CheckpointFolder,
        adapter_config: dict[str, Any],
        provenance: Callable[[TrainerState], dict[str, Any]],
    ) -> None:
        self._engine = engine
        self._checkpoints = checkpoints
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
        tensors = gather_state(self._engine)
        if is_rank_zero():
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
    state = {f"{WEIGHT}/{name}": weight for name, weight in weights.items()}
    restore_state(engine, state | _zeros(state, MOMENTS[0]) | _zeros(state, MOMENTS[1]), 0)


def check_names(engine: Engine, state: dict[str, torch.Tensor]) -> None:
    """The state must be of this model's trainable parameters.

    Raises:
        CheckpointError: names the first difference.
    """
    expected = {
        f"{kind}/{name}": tuple(_shape(p)) for name, p in engine.trainable().items() for kind in (WEIGHT, *MOMENTS)
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


def _check_spans(engine: Engine, spans: list[list[Span]]) -> None:
    """All ranks find the same: DeepSpeed's parts are read where it keeps them, which another version might change."""
    for index, (name, parameter) in enumerate(engine.trainable().items()):
        end, held = 0, sorted(rank[index] for rank in spans if rank[index][1])
        for first, size in held:
            end = end + size if first == end else -1
        if end != _shape(parameter).numel():
            raise CheckpointError(
                f"{name} has {_shape(parameter).numel()} values, but the ranks hold {held} (first value, number): this "
                "version of DeepSpeed keeps its parts in another way; install the one in constraints.txt"
            )


def _gather(engine: Engine, kind: str, spans: list[list[Span]]) -> dict[str, torch.Tensor]:
    """One kind's tensors on rank 0; nothing on the others.

    Args:
        engine: whose state is gathered.
        kind: of the state.
        spans: of every rank, in the order of ``Engine.trainable``.
    """
    mine = torch.cat([share.to(engine.device, torch.float32) for _, share in _shares(engine, kind)])
    parts = gather_on_rank_zero(mine, [sum(size for _, size in rank) for rank in spans])
    if not parts:
        return {}
    pieces = [part.cpu().split([size for _, size in rank]) for part, rank in zip(parts, spans, strict=True)]
    state = {}
    for index, (name, parameter) in enumerate(engine.trainable().items()):
        whole = torch.empty(_shape(parameter).numel())
        for rank, piece in zip(spans, pieces, strict=True):
            first, size = rank[index]
            whole[first : first + size] = piece[index]
        state[f"{kind}/{name}"] = whole.view(_shape(parameter))
    return state


def _shares(engine: Engine, kind: str) -> list[tuple[int, torch.Tensor]]:
    """What this rank holds of each trainable parameter: its first value's place, and the values, flat."""
    return [_share(engine, parameter, None if kind == WEIGHT else kind) for parameter in engine.trainable().values()]


def _share(engine: Engine, parameter: nn.Parameter, key: str | None) -> tuple[int, torch.Tensor]:
    if engine.stage == 0:  # all hold everything: rank 0's is taken
        value = parameter.data if key is None else engine.adam.state[parameter][key]
        return 0, value.flatten() if is_rank_zero() else torch.empty(0)
    if engine.stage == 3:
        part = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
        first = part.numel() * engine.zero_optimizer._get_param_partition_rank(parameter)
        return first, part[: max(0, parameter.ds_numel - first)]  # the last rank's is padded
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, torch.empty(0)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach()


def _shape(parameter: nn.Parameter) -> torch.Size:
    """That of the whole parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _zeros(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Moments beside the weights of a state."""
    weights = {name: weight for name, weight in state.items() if name.startswith(f"{WEIGHT}/")}
    return {name.replace(WEIGHT, kind, 1): torch.zeros_like(weight) for name, weight in weights.items()}


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
