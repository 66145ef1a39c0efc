"""Forward passes that all ranks make together, as ZeRO-3 demands: the ranks gather each layer's weights in common."""

from __future__ import annotations

import numpy as np
import torch

from trsr_dist.distributed import sum_over_ranks
from trsr_dist.evaluate.scoring import ScoreRow
from trsr_dist.rows import PackedRow


class Lockstep:
    """A forward pass for ranks that have different numbers of rows.

    Args:
        forward: the pass itself.
        filler: a row that a rank runs while others still have rows of their own.
        device: of the collectives.
    """

    def __init__(self, forward: ScoreRow, filler: PackedRow, device: torch.device) -> None:
        self._forward = forward
        self._filler = filler
        self._device = device

    def __call__(self, row: PackedRow) -> np.ndarray:
        """Scores of a row of this rank."""
        self._is_wanted(True)
        return self._forward(row)

    def finish(self) -> None:
        """This rank has no more rows: go along until none has."""
        while self._is_wanted(False):
            self._forward(self._filler)

    def _is_wanted(self, here: bool) -> bool:
        return sum_over_ranks([float(here)], self._device)[0] > 0
