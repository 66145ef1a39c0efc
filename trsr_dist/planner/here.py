"""This machine as hardware to plan for: its GPU, or one of its cores, by a matrix product."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch

from trsr_dist.planner.hardware import CPU_PROCESS_BYTES, GB, Hardware, recognize

ROUNDS = 7
CPU_SIZES = (1024, 1024, 2048)
"""Rows, inner and outer size of the measured product, as in a small model's layers."""
GPU_SIZES = (8192, 8192, 8192)
CPU_UTILIZATION = 0.6
"""Training a 135M model on 2 cores reached 0.54 to 0.66 of the rate of a product."""
LOOPBACK_BYTES_PER_SECOND = GB
LINK_SHARE = 0.1
"""Links are not measured. Processes of one machine are assumed to have the above, unknown GPUs with this share of their
memory's rate: a LoRA adapter's traffic is small."""


def this_machine(num_devices: int) -> Hardware:
    """One of ``num_devices`` equal shares of this machine: a GPU, or a core with its part of the memory."""
    if torch.cuda.is_available():
        return _gpu()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // num_devices
    copied, loopback = _copied_bytes_per_second("cpu"), LOOPBACK_BYTES_PER_SECOND
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rate = _flops_per_second(CPU_SIZES, "cpu", torch.float32)
    finally:
        torch.set_num_threads(threads)
    return Hardware(
        name="CPU core",
        flops_per_second=rate,
        memory_bytes=memory,
        memory_bytes_per_second=copied,
        node_bytes_per_second=loopback,
        network_bytes_per_second=loopback,
        precision="float32",
        utilization=CPU_UTILIZATION,
        process_bytes=CPU_PROCESS_BYTES,
        is_cpu=True,
    )


def _gpu() -> Hardware:
    from trsr_dist.model.loading import resolve_precision

    known = recognize(torch.cuda.get_device_name())
    if known:
        return known
    memory = torch.cuda.get_device_properties(0).total_memory
    precision = resolve_precision("auto", torch.device("cuda"))
    rate, slow = (_flops_per_second(GPU_SIZES, "cuda", dtype) for dtype in (getattr(torch, precision), torch.float32))
    copied = _copied_bytes_per_second("cuda")
    return Hardware(
        name=torch.cuda.get_device_name(),
        flops_per_second=rate,
        memory_bytes=memory,
        memory_bytes_per_second=copied,
        node_bytes_per_second=LINK_SHARE * copied,
        precision=precision,
        float32_flops_per_second=slow,
    )


def _flops_per_second(sizes: tuple[int, int, int], device: str, dtype: torch.dtype) -> float:
    rows, inner, outer = sizes
    a, b = torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(inner, outer, dtype=dtype, device=device)
    return 2 * rows * inner * outer / _seconds(lambda: a @ b, device)


def _copied_bytes_per_second(device: str) -> float:
    block = torch.ones(2**26, dtype=torch.uint8, device=device)
    return 2 * block.numel() / _seconds(block.clone, device)


def _seconds(work: Callable[[], object], device: str) -> float:
    """Median; the first round, in which libraries load their kernels, is left out. Of a core that others use too, its
    own seconds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found = []
    for _ in range(ROUNDS + 1):
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - start)
    return median(found[1:])
