"""Writes what a merged folder holds: weights and whatever else a server needs.

Weights go through in blocks of rows: memory does not grow with the model, nor with its largest tensor.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from trsr_dist.bases import ADAPTER_CONFIG, CONFIG
from trsr_dist.errors import ModelError
from trsr_dist.files import read_json, write_json
from trsr_dist.log import progress
from trsr_dist.merge.plan import MergePlan, Output
from trsr_dist.model.artifacts import PROVENANCE
from trsr_dist.run import MANIFEST
from trsr_dist.weights import DTYPES, INDEX, header_bytes

BLOCK_ELEMENTS = 2**20
"""Elements of a tensor that are merged at once: 4 MiB in float32, which stays in the processor's cache."""
NUM_WRITERS = 2
"""Tensors written at once: one waits for the disk while the other computes."""
COPY_BYTES = 2**26
PASSED_BYTES = 2**24
"""Copied at once where the kernel cannot."""
UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of copy_file_range between file systems that cannot do it."""
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
LEGAL = ("LICENSE", "NOTICE", "USE_POLICY", "COPYING")
LEFT_OUT = {MANIFEST, PROVENANCE, ADAPTER_CONFIG, "trainer_state.json", "README.md"}
TOKENIZER = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece", "sentencepiece")
TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps further chat templates."""


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
            header = header_bytes([(out.name, out.code, out.shape) for out in outputs])
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
    for _, _, exact in output.blocks(BLOCK_ELEMENTS, torch.float32):
        block = rounded_rows(output, exact)
        position = _write_at(target, block.contiguous().view(torch.uint8).numpy(), position)
        bar.update(block.nbytes)


def rounded_rows(output: Output, exact: torch.Tensor) -> torch.Tensor:
    """Rows of the merged tensor, computed in float32, rounded once to the output's dtype.

    Raises:
        ModelError: a finite value becomes infinite in the output's dtype.
    """
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


def copy_other_files(base: Path, tokenizer: Path, output: Path) -> None:
    """Copy what a server needs beside the weights: config, chat template, licence; the tokenizer from ``tokenizer``."""
    for folder, is_tokenizer in ((base, False), (tokenizer, True)):
        for path in folder.iterdir():
            if _is_copied(path) and path.name.startswith(TOKENIZER) == is_tokenizer:
                shutil.copyfile(path, output / path.name)
    if (tokenizer / TEMPLATES).is_dir():
        shutil.copytree(tokenizer / TEMPLATES, output / TEMPLATES)


def _is_copied(path: Path) -> bool:
    if not path.is_file() or path.name in LEFT_OUT or path.name.startswith(".") or path.name.endswith(".index.json"):
        return False
    return path.suffix in SUFFIXES or path.name.upper().startswith(LEGAL)


def adapt_config(output: Path, unties: bool, dtype: torch.dtype | None, values: dict[str, Any]) -> None:
    """Write into config.json what the merge changed, and ``values``; left byte for byte where nothing has changed."""
    path = output / CONFIG
    config = read_json(path, finite=False)
    before, nested = json.dumps(config), config.get("text_config")
    for section in [config, nested] if isinstance(nested, dict) else [config]:
        if unties and (section is config or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
        if dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in section or (section is config and key == "dtype" and "torch_dtype" not in section):
                    section[key] = str(dtype).removeprefix("torch.")
    config |= values
    if json.dumps(config) != before:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
