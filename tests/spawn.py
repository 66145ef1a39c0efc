"""Run a function as real gloo ranks, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240.0


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *args: object) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in every rank of a process group; returns the results by rank.

    The function must stand at the top of a module, and its result must pickle.

    Raises:
        AssertionError: a rank failed or did not answer in time; holds its traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_rank_main, args=(sender, Path(folder), function, rank, world_size, args), daemon=False
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        try:
            return [_receive(rank, receiver) for rank, (receiver, _) in enumerate(pipes)]
        finally:
            for rank in ranks:
                rank.join(5)
                if rank.is_alive():
                    rank.kill()
                    rank.join()


def _receive(rank: int, receiver: Connection) -> object:
    assert receiver.poll(TIMEOUT_SECONDS), f"rank {rank} gave no answer in {TIMEOUT_SECONDS:.0f} s"
    fine, value = receiver.recv()
    assert fine, f"rank {rank} failed:\n{value}"
    return value


def _rank_main(
    sender: Connection, folder: Path, function: Callable[..., Any], rank: int, world_size: int, args: tuple
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        sender.send((True, function(rank, world_size, *args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()
