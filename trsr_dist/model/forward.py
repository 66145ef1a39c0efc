"""The forward pass of scoring: one row in, log-odds out."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from trsr_dist.model.inputs import RowInputs
from trsr_dist.rows import PackedRow


@torch.no_grad()
def score_row(model: nn.Module, row: PackedRow, device: torch.device) -> np.ndarray:
    """Log-odds logit(yes) - logit(no) of a row's answers, float32, shape (num_answers,).

    Args:
        model: a ``Recommender``, or DeepSpeed's engine around it.
        row: with at least one user.
        device: of the model.
    """
    pair = model(RowInputs(row, device), "pair")
    return (pair[:, 0] - pair[:, 1]).cpu().numpy()
