"""FP8 products on a GPU that has them, against the CPU's."""

from __future__ import annotations

import pytest
import torch

from tests.model.test_fp8 import WIDTHS, inputs, make_layer
from trsr_dist.errors import ConfigError
from trsr_dist.model.fp8 import check_fp8

CUDA = torch.device("cuda")


def test_products_are_those_of_the_cpu() -> None:
    try:
        check_fp8(CUDA, torch.bfloat16)
    except ConfigError as error:
        assert torch.cuda.get_device_capability() < (8, 9), error
        pytest.skip(str(error))
    found = []
    for device in ("cpu", CUDA):
        layer, x = make_layer(torch.bfloat16).to(device), inputs(torch.bfloat16).to(device).requires_grad_()
        output = layer(x)
        output.backward(torch.ones_like(output))
        found.append([part.detach().flatten(0, 1).float().cpu() for part in (output, x.grad)])
    assert found[0][0].shape == (14, WIDTHS[1])
    for ours, theirs in zip(*found, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert float((one - other).norm()) <= 1e-2 * float(one.norm())
