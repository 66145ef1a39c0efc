"""Which models and devices run on fused kernels; the kernels themselves: test_liger.py."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import Gemma2Config

from tests.model.world import CPU, model_config
from trsr_dist.errors import ConfigError
from trsr_dist.model.kernels import choose_kernels

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_without_a_gpu_only_a_wish_is_an_error() -> None:
    config = model_config()
    assert not choose_kernels("auto", CPU, config) and not choose_kernels("none", CPU, config)
    with pytest.raises(ConfigError, match="model.kernels=liger: needs a GPU; model.kernels=auto"):
        choose_kernels("liger", CPU, config)


def test_without_the_package_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert not choose_kernels("auto", CUDA, model_config())
    with pytest.raises(ConfigError, match=r"liger-kernel cannot be used .*; pip install 'trsr_dist\[liger\]'"):
        choose_kernels("liger", CUDA, model_config())


@pytest.mark.parametrize("config", [Gemma2Config(), model_config(hidden_act="gelu")], ids=["kind", "activation"])
def test_other_architectures_are_refused(config: object) -> None:
    assert not choose_kernels("auto", CUDA, config)
    with pytest.raises(ConfigError, match="has not been proven"):
        choose_kernels("liger", CUDA, config)
