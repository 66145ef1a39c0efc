"""A back end that is wrong on this device is found before it is used, and left out or refused."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from tests.model.world import CPU
from trsr_dist.errors import ConfigError
from trsr_dist.model.attention import backends, self_check
from trsr_dist.model.attention.backends import build_backend, cascade
from trsr_dist.model.attention.cpu import CpuKernel
from trsr_dist.model.attention.layout import Call
from trsr_dist.model.attention.self_check import Heads, choose_checked, fault_of

HEADS = Heads(4, 2, 16)


class Wrong(CpuKernel):
    """Each kind of fault that a kernel may have."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def forward(self, q, k, v, call: Call, scale: float):  # noqa: ANN001, ANN201
        if self.fault == "raises":
            raise RuntimeError("no kernel image is available\nfor this device")
        out, lse = super().forward(q, k, v, call, scale * (1.1 if self.fault == "scale" else 1))
        return (out, lse + 0.1) if self.fault == "lse" and not call.causal else (out, lse)

    def backward(self, grad, tensors, call: Call, scale: float):  # noqa: ANN001, ANN201
        dq, dk, dv = super().backward(grad, tensors, call, scale)
        if self.fault == "nan":
            dk[0] = float("nan")
        return dq, dk * (0.95 if self.fault == "dk" else 1), dv


@pytest.mark.parametrize("heads", [HEADS, Heads(9, 3, 64), Heads(1, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cpu", "dense"])
def test_right_back_ends_pass(name: str, dtype: torch.dtype, heads: Heads) -> None:
    assert fault_of(build_backend(name), CPU, dtype, heads) == ""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("scale", "its output differs from exact attention by"),
        ("lse", "its output differs"),
        ("dk", "dk differs from exact attention by 0.05 of its size"),
        ("nan", "dk differs from exact attention by nan"),
        ("raises", "RuntimeError: no kernel image is available$"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_are_seen(fault: str, said: str, dtype: torch.dtype) -> None:
    found = fault_of(cascade(Wrong(fault), copies_head=False), CPU, dtype, HEADS)
    assert re.match(said, found), found


def test_a_wrong_one_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_checked("auto", CPU, torch.float32, HEADS) == "cpu"
    wrong = cascade(Wrong("dk"), copies_head=False)
    monkeypatch.setattr(self_check, "build_backend", {"cpu": wrong, "dense": backends.dense_attention}.__getitem__)
    with caplog.at_level(logging.WARNING):
        assert choose_checked("auto", CPU, torch.float32, HEADS) == "dense"
    assert "cpu is left out, since it does not work here: dk differs" in caplog.text
    with pytest.raises(ConfigError, match="model.attention=cpu does not work here: dk differs .*; use auto"):
        choose_checked("cpu", CPU, torch.float32, HEADS)
