"""The learning rate as a pure function of the step: nothing to save, nothing to go wrong on resumption."""

from __future__ import annotations

import math


def learning_rate(step: int, num_steps: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Rate of step ``step`` (from 0) of ``num_steps``.

    Rises linearly to ``peak`` over the warm-up, whose first step is not 0; then stays (constant), or falls to 0 at the
    end linearly or along a half cosine.
    """
    warmup = round(num_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
