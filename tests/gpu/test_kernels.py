"""Fused kernels on a GPU against the stock layers."""

from __future__ import annotations

import pytest
import torch

from tests.model.world import CONFIGS, gradients, make_model, make_row, model_config, recommender, relative
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.kernels import choose_kernels, use_kernels
from trsr_dist.model.recommender import Recommender

CUDA = torch.device("cuda")


def run(model: Recommender) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers' states, and the LoRA gradients of a product with fixed random numbers."""
    states = model.states(RowInputs(make_row(12), CUDA), True)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    (states * weights).sum().backward()
    return states.detach().float().cpu(), gradients(model).cpu()


def stock(kind: str, dtype: torch.dtype, checkpointing: bool = False) -> Recommender:
    return recommender(make_model(model_config(kind), dtype, "all").to(CUDA), "dense", checkpointing)


def fused(kind: str, dtype: torch.dtype, checkpointing: bool) -> Recommender:
    pytest.importorskip("liger_kernel")
    model = stock(kind, dtype, checkpointing)
    assert choose_kernels("auto", CUDA, model.causal.config)
    use_kernels(model.causal)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_fused_kernels_equal_the_stock_layers(kind: str, checkpointing: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    found, expected = run(fused(kind, torch.float32, checkpointing)), run(stock(kind, torch.float32))
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    assert relative(found[1], expected[1]) < 1e-4
    near = run(stock(kind, torch.bfloat16))
    for one, other, exact in zip(run(fused(kind, torch.bfloat16, checkpointing)), near, expected, strict=True):
        assert relative(one, exact) < 2 * relative(other, exact)
