"""The forward pass of scoring: one row in, log-odds out."""

from __future__ import annotations

import numpy as np
import torch

from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.rows import PackedRow


@torch.no_grad()
def score_row(model: Recommender, row: PackedRow) -> np.ndarray:
    """Log-odds logit(yes) - logit(no) of a row's answers, float32, shape (num_answers,)."""
    pair = model(RowInputs(row, model.device), "pair")
    return (pair[:, 0] - pair[:, 1]).cpu().numpy()
