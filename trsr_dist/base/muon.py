"""Muon in float32 (K. Jordan and others, 2024, https://kellerjordan.github.io/posts/muon): momentum whose steps are
made orthogonal. PyTorch's own iterates in bfloat16, which most CPUs emulate: there a step takes seconds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
EPSILON = 1e-7


class Muon(Optimizer):
    """For matrices; a step changes each of them by a matrix whose singular values are near the learning rate.

    Args:
        matrices: parameters of two dimensions.
        lr: learning rate, for matrices that are not higher than wide.
        momentum: of the gradients, Nesterov's.
        weight_decay: decoupled.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for (height, width), matrices in shapes.items():
                gradients = [self._direction(matrix, group["momentum"]) for matrix in matrices]
                steps = orthogonal(torch.stack(gradients))
                rate = group["lr"] * max(1.0, height / width) ** 0.5
                for matrix, step in zip(matrices, steps, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-rate)

    def _direction(self, matrix: nn.Parameter, momentum: float) -> torch.Tensor:
        average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of each matrix U S V^T, by Newton-Schulz iteration: singular values from about 0.7 to 1.2.

    Args:
        matrices: float32, shape (number, height, width).
    """
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    found = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    for _ in range(NUM_ITERATIONS):
        squares = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(squares, squares, squares, beta=b, alpha=c), found, beta=a)
    return found if wide is matrices else found.mT
