"""Writes merged weights in blocks of rows: memory does not grow with the model, nor with its largest tensor."""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from trsr_dist.errors import ModelError
from trsr_dist.files import write_json
from trsr_dist.log import progress
from trsr_dist.merge.plan import MergePlan, Output
from trsr_dist.weights import DTYPES, INDEX, header_bytes, read_rows

BLOCK_ELEMENTS = 2**20
"""Elements of a tensor that are merged at once: 4 MiB in float32, which stays in the processor's cache."""
NUM_WRITERS = 2
"""Tensors written at once: one waits for the disk while the other computes."""
COPY_BYTES = 2**26
PASSED_BYTES = 2**24
"""Copied at once where the kernel cannot."""
UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of copy_file_range between file systems that cannot do it."""


def write_weights(folder: Path, plan: MergePlan) -> None:
    """Write the files of ``plan`` and their index into an empty folder.

    Raises:
        ModelError: a base file ends early, or a value does not fit the asked dtype.
    """
    with (
        progress(total=plan.num_bytes, description="merge", unit="B") as bar,
        ExitStack() as files,
        ThreadPoolExecutor(NUM_WRITERS) as writers,
    ):
        jobs: list[Future[None]] = []
        for name, outputs in zip(plan.file_names, plan.files, strict=True):
            target = files.enter_context(open(folder / name, "wb", buffering=0)).fileno()
            header = header_bytes([(out.name, out.code, out.source.shape) for out in outputs])
            position = _write_at(target, header, 0)
            for output in outputs:
                jobs.append(writers.submit(_write_tensor, target, position, output, bar))
                position += output.num_bytes
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
    if len(plan.files) > 1:
        write_json(folder / INDEX, plan.index)


def _write_tensor(target: int, position: int, output: Output, bar: tqdm) -> None:
    if output.is_copy:
        _copy_bytes(target, position, output, bar)
        return
    for first, base in read_rows(output.source, BLOCK_ELEMENTS):
        block = merged_rows(output, base, first)
        position = _write_at(target, block.contiguous().view(torch.uint8).numpy(), position)
        bar.update(block.nbytes)


def merged_rows(output: Output, base: torch.Tensor, first: int) -> torch.Tensor:
    """Rows of the merged tensor: computed in float32, rounded once to the output's dtype.

    Raises:
        ModelError: a finite value becomes infinite in the output's dtype.
    """
    exact = output.change.rows(base, first) if output.change is not None else base
    rounded = exact.to(DTYPES[output.code])
    # aminmax is one pass over the block and carries NaN through; isfinite().all() takes three.
    if not torch.isfinite(torch.stack(rounded.aminmax())).all():
        raise ModelError(
            f"{output.name}: merged values are not finite in {DTYPES[output.code]} (largest before rounding: "
            f"{exact.abs().max().item():.3g}); choose a wider --dtype, or the base or adapter is damaged"
        )
    return rounded


def _copy_bytes(target: int, position: int, output: Output, bar: tqdm) -> None:
    """Let the kernel copy the bytes; they do not pass through this process."""
    entry, done = output.source, 0
    with open(entry.file, "rb", buffering=0) as source:
        while done < entry.num_bytes:
            count = min(COPY_BYTES, entry.num_bytes - done)
            start = entry.start + done
            try:
                copied = os.copy_file_range(source.fileno(), target, count, start, position + done)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                data = os.pread(source.fileno(), min(count, PASSED_BYTES), start)
                copied = _write_at(target, data, position + done) - position - done
            if not copied:
                raise ModelError(f"{entry.file}: ends within {entry.name}: truncated; copy it again")
            done += copied
            bar.update(copied)


def _write_at(target: int, data: bytes | np.ndarray, position: int) -> int:
    """Write all of ``data``; returns the position behind it."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(target, view, position)
        view, position = view[written:], position + written
    return position
