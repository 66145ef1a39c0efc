"""Proof that the written weights are the base plus the adapter: read back, recomputed in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from trsr_dist.errors import ModelError
from trsr_dist.log import progress
from trsr_dist.merge.plan import MergePlan, Output
from trsr_dist.weights import TensorEntry, file_entries, read_rows

BLOCK_ELEMENTS = 2**18
"""Elements that are compared at once: 2 MiB in float64, which stays in the processor's cache."""
FLOAT32_NOISE = 1e-6
"""What float32 arithmetic may add to the rounding of the output, relative to the row's largest value."""


@dataclass(slots=True)
class WeightCheck:
    """Figures of the read-back."""

    num_changed: int = 0
    num_copied: int = 0
    largest_difference: float = 0.0
    """Absolute, merged weight against base + scale * BA in float64."""
    largest_relative: float = 0.0
    """The same over the largest value of its row."""


def check_weights(folder: Path, plan: MergePlan) -> WeightCheck:
    """Read every changed tensor back and compare it.

    Raises:
        ModelError: a tensor is missing, or differs by more than one rounding of the output's dtype.
    """
    result = WeightCheck()
    with progress(total=len(plan.outputs), description="verify", unit="tensor") as bar:
        for name, outputs in zip(plan.file_names, plan.files, strict=True):
            written = {entry.name: entry for entry in file_entries(folder / name)}
            for output in outputs:
                if output.name not in written:
                    raise ModelError(f"{folder / name}: {output.name} is missing after the merge")
                if output.is_copy:
                    result.num_copied += 1
                else:
                    result.num_changed += 1
                    _check_tensor(output, written[output.name], result)
                bar.update()
    return result


def _check_tensor(output: Output, written: TensorEntry, result: WeightCheck) -> None:
    finfo = torch.finfo(written.dtype)
    blocks = output.blocks(BLOCK_ELEMENTS, torch.float64)
    for (first, base, merged), (_, found) in zip(blocks, read_rows(written, BLOCK_ELEMENTS), strict=True):
        exact = merged.double()
        difference = exact.sub(found).abs_()
        magnitude = exact.abs()
        scale = torch.maximum(magnitude.amax(dim=1), base.abs().amax(dim=1))
        largest = difference.amax(dim=1)
        excess = difference.sub_(magnitude, alpha=0.5 * finfo.eps).amax(dim=1)
        wrong = ~(excess <= FLOAT32_NOISE * scale + finfo.tiny * finfo.eps)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ModelError(
                f"{written.file}: row {first + row} of {output.name} is not base + adapter (difference "
                f"{largest[row].item():.3g}); the disk or memory is faulty, or the base changed during the merge"
            )
        result.largest_difference = max(result.largest_difference, largest.max().item())
        relative = (largest / scale.clamp_min(torch.finfo(torch.float32).tiny)).max().item()
        result.largest_relative = max(result.largest_relative, relative)
