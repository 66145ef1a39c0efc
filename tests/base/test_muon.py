"""The optimizer of the small base against PyTorch's, which iterates in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trsr_dist.base.pretrain import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_steps_are_pytorchs_up_to_what_bfloat16_rounds(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    for parameter, optimizer in (
        (ours, Muon([ours], lr=0.1, momentum=0.95, weight_decay=0.1)),
        (theirs, torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.1)),
    ):
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.01 * moved
    assert (ours - start).norm() > 0.9 * moved


def test_singular_values_come_near_one_whatever_their_size() -> None:
    torch.manual_seed(0)
    matrices = torch.stack([torch.randn(12, 30) * scale for scale in (1e-3, 1.0, 1e3)])
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))
