"""What a running training shows: log lines, a progress bar, metrics.jsonl and the trackers; on rank 0."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from trsr_dist.log import get_logger, progress
from trsr_dist.metric_log import MetricLog
from trsr_dist.train.meter import Sums, scalars

log = get_logger("train")


@dataclass(frozen=True, slots=True)
class Progress:
    """Of one step."""

    step: int
    """Counted from 1: the step just made."""
    epoch: int
    learning_rate: float
    grad_norm: float
    seconds: float
    is_applied: bool
    """False: skipped, since a loss or a gradient was not finite."""


class Monitor:
    """Collects steps and writes every n-th.

    Args:
        metrics: None on all ranks but the first.
        num_steps: of the whole training.
        first_step: steps that earlier starts made.
        every: steps between two log lines.
        flops: from sums to floating point operations.
        peak_flops: of all devices, per second; 0: unknown.
    """

    def __init__(
        self,
        metrics: MetricLog | None,
        num_steps: int,
        first_step: int,
        every: int,
        flops: Callable[[Sums], float],
        peak_flops: float,
    ) -> None:
        self._metrics = metrics
        self._num_steps = num_steps
        self._every = every
        self._flops = flops
        self._peak_flops = peak_flops
        self._start_interval()
        self._made: Progress | None = None
        self._last: dict[str, float] = {}
        self._bar = progress(total=num_steps, description="train", unit="step", lines=False) if metrics else None
        if self._bar is not None:
            self._bar.update(first_step)

    def add(self, made: Progress, sums: Sums) -> None:
        """Take a step's sums over all ranks."""
        if self._metrics is None:
            return
        # One loss that is not finite would hide those of the other steps.
        self._sums.add(sums if made.is_applied else replace(sums, loss=0.0, weight=0.0))
        self._skipped += not made.is_applied
        self._seconds += made.seconds
        self._steps += 1
        self._made = made
        self._bar.update(1)
        if made.step % self._every == 0 or made.step == self._num_steps:
            self._write(made)

    def saved(self, step: int, seconds: float) -> None:
        """The ranks stood still for so long for a checkpoint."""
        if self._metrics is not None:
            self._metrics.write(step, {"train/checkpoint_seconds": seconds})

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The validation users were ranked."""
        if self._metrics is not None:
            self._metrics.write(step, {f"valid/{name}": value for name, value in metrics.items()})

    def close(self, settings: dict[str, Any], final: dict[str, float]) -> None:
        """Write what no line has shown yet, and the hyperparameters beside the final metrics; without any, beside the
        last line's loss and AUC."""
        if self._metrics is None:
            return
        if self._steps:
            self._write(self._made)
        self._bar.close()
        self._metrics.close(settings, final or self._last)

    def _write(self, made: Progress) -> None:
        values = scalars(self._sums, self._seconds, self._flops(self._sums), self._peak_flops)
        eta = (self._num_steps - made.step) * self._seconds / self._steps
        values |= {
            "train/learning_rate": made.learning_rate,
            "train/grad_norm": made.grad_norm,
            "train/epoch": made.epoch,
            "train/skipped_steps": self._skipped,
            "train/memory_gb": peak_memory_bytes() / 1e9,
            "train/eta_seconds": eta,
        }
        self._metrics.write(made.step, values)
        self._last = {name: values[f"train/{name}"] for name in ("loss", "auc") if f"train/{name}" in values}
        log.info(describe(made, self._num_steps, values))
        self._start_interval()

    def _start_interval(self) -> None:
        self._sums, self._seconds, self._steps, self._skipped = Sums(), 0.0, 0, 0


def describe(made: Progress, num_steps: int, values: dict[str, float]) -> str:
    """One line."""
    parts = [f"step {made.step}/{num_steps}", f"loss {values.get('train/loss', float('nan')):.4f}"]
    if "train/auc" in values:
        parts.append(f"auc {values['train/auc']:.3f}")
    parts += [
        f"lr {made.learning_rate:.2e}",
        f"grad {made.grad_norm:.2f}",
        f"{values['train/tokens_per_second']:.0f} tokens/s",
        f"{values['train/users_per_second']:.1f} users/s",
        f"fill {values['train/row_fill']:.2f}",
        f"sharing {values['train/sharing_gain']:.2f}x",
        f"data wait {values['train/data_wait_share']:.1%}",
    ]
    if "train/mfu" in values:
        parts.append(f"MFU {values['train/mfu']:.1%}")
    return "  ".join([*parts, f"ETA {clock(values['train/eta_seconds'])}"])


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory_bytes() -> int:
    """Highest memory of this rank: the GPU's, or without one the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
