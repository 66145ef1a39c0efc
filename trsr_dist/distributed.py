"""The one place for process groups and collectives. Every function also works in a single process without a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trsr_dist.environment import Ranks, export_ranks
from trsr_dist.errors import RunError, TrsrError

T = TypeVar("T")

TIMEOUT_SECONDS = 1800.0
PATIENT_SECONDS = 6 * 3600.0
"""What the largest models may take to be fetched."""
_meetings = count()


def device_of(ranks: Ranks) -> torch.device:
    """This rank's device. Where Slurm shows each task its own GPU only, that one has number 0."""
    if torch.cuda.is_available():
        return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    return torch.device("cpu")


@contextmanager
def process_group(ranks: Ranks, timeout_seconds: float = TIMEOUT_SECONDS, always: bool = False) -> Iterator[None]:
    """Within this context the ranks are joined: by NCCL on GPUs, by gloo on CPUs. A group that is there is used.

    Args:
        ranks: this process.
        timeout_seconds: a collective that takes longer raises.
        always: make a group of one process too (DeepSpeed wants one).
    """
    if dist.is_initialized() or (ranks.world_size == 1 and not always):
        yield
        return
    device = device_of(ranks)
    # DeepSpeed takes LOCAL_RANK for the number of the GPU among those that this task sees.
    export_ranks(replace(ranks, local_rank=device.index) if device.type == "cuda" else ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # A lone process meets nobody: with its own store it needs no port, which another one might hold.
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if ranks.world_size == 1 else {}
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **alone)
    try:
        yield
    except BaseException:
        if backend == "nccl":  # which would wait for members that may be dead
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks that are joined; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this is rank 0; True without a group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Elementwise sums, in double precision."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def on_rank_zero(action: Callable[[], T]) -> T:
    """What ``action`` gives on rank 0 (any object that pickles), on all ranks; where it fails, all ranks fail at once.

    Raises:
        TrsrError: rank 0's. Where that one met another error, it raises it, and the others say so.
    """
    value, error = None, RunError("rank 0 has failed; its own error says why")
    try:
        if is_rank_zero():
            value, error = action(), None
    except TrsrError as found:
        error = found
    finally:
        if dist.is_initialized():
            box = [value, error]
            dist.broadcast_object_list(box, src=0)
            value, error = box
    if error is not None:
        raise error
    return value


def once_per_node(action: Callable[[], object], ranks: Ranks, seconds: float = PATIENT_SECONDS) -> None:
    """Let the first rank of every node act, as long as that takes: the others wait without a collective's time limit.

    Raises:
        TrsrError: that of some rank, on all ranks. A rank that met another error raises it, and the others say so.
    """
    error = None
    if ranks.local_rank == 0:
        try:
            action()
        except Exception as found:
            error = found
    if dist.is_initialized():  # the group's store has no watchdog
        store, name = dist.distributed_c10d._get_default_store(), f"trsr/meeting-{next(_meetings)}"
        if store.add(name, 1) == dist.get_world_size():
            store.set(f"{name}/all", "here")
        store.wait([f"{name}/all"], timedelta(seconds=seconds))
    told = error
    if error is not None and not isinstance(error, TrsrError):
        told = RunError(f"rank {ranks.rank} on {ranks.host} has failed; its own error says why")
    errors = [found for found in gather_objects(told) if found is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_rank_zero(values: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Every rank's values on rank 0, by one collective; on the others an empty list.

    Args:
        values: 1-D, of this rank's size; one dtype and kind of device on all ranks.
        sizes: every rank's, known to all. Where no other rank has any, nothing is sent.
    """
    if not any(sizes[1:]):
        return [values, *(values[:0] for _ in sizes[1:])] if is_rank_zero() else []
    padded = torch.nn.functional.pad(values, (0, max(sizes) - len(values)))  # a gather takes one size
    parts = [torch.empty_like(padded) for _ in sizes] if is_rank_zero() else None
    dist.gather(padded, parts)
    return [part[:size] for part, size in zip(parts or [], sizes, strict=False)]
