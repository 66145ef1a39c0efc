"""Network checks of the preflight: can every rank reach rank 0, and how fast is an all-reduce over all ranks."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from trsr_dist.environment import Ranks

MEGABYTES = 16
ROUNDS = 3


def open_port() -> socket.socket:
    """A listening socket on a free port of this node; connections to it need not be accepted."""
    return socket.create_server(("", 0), backlog=4096)


def reach(host: str, port: int, seconds: float) -> str:
    """Try to connect; empty, or what is wrong."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return f"cannot reach {host}:{port}: {error}"
    return ""


def all_reduce_bandwidth(ranks: Ranks, seconds: float) -> float:
    """Bus bandwidth of an all-reduce over all ranks, in GB/s: 2 (n - 1) / n times the bytes, as NCCL's tests count.

    Raises:
        RuntimeError: the sum is wrong, or the backend failed or took longer than ``seconds``.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=seconds))
    try:
        values = torch.zeros(MEGABYTES * 2**20 // 4, device=device)
        for _ in range(ROUNDS):
            values.fill_(1)
            start = time.perf_counter()
            dist.all_reduce(values)
            found = values[-1].item()  # waits for the GPU
            taken = time.perf_counter() - start
            if found != ranks.world_size:
                raise RuntimeError(f"an all-reduce of ones over {ranks.world_size} ranks gave {found}")
    finally:
        dist.destroy_process_group()
    return 2 * (ranks.world_size - 1) / ranks.world_size * values.numel() * 4 / taken / 1e9
