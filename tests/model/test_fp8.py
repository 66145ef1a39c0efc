"""FP8 products against float32 arithmetic on the same rounded numbers, and what of a base is held so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.merge.models import make_base
from tests.model.world import CPU, Counted, make_row, model_config, recommender, relative
from tests.model.world import run as run_row
from trsr_dist.errors import ConfigError
from trsr_dist.model.adapters import add_lora
from trsr_dist.model.fp8 import Fp8Linear, check_fp8, hold_in_fp8
from trsr_dist.model.loading import load_base
from trsr_dist.pretrained import BaseSource

WIDTHS = (96, 48)
LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "use_rslora": False, "init": "kaiming"}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What a row becomes in e4m3 under its own scale, float32; on the way it is rounded to its dtype once."""
    scale = 1 / (448 / x.abs().amax(1, keepdim=True).clamp(min=1e-30)).to(x.dtype).float()
    return (x.float() / scale).to(x.dtype).to(torch.float8_e4m3fn).float() * scale


def make_layer(dtype: torch.dtype, bias: bool = False) -> Fp8Linear:
    torch.manual_seed(0)
    linear = nn.Linear(*WIDTHS, bias=bias)
    linear.weight.data *= torch.logspace(-3, 3, WIDTHS[1])[:, None]
    return Fp8Linear(linear.to(dtype).requires_grad_(False))


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """Rows of all sizes, one of zeros."""
    torch.manual_seed(1)
    rows = torch.randn(2, 7, WIDTHS[0]) * torch.logspace(-12, 6, 7)[:, None]
    rows[0, 3] = 0
    return rows.to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_forward_product(dtype: torch.dtype, near: float, bias: bool) -> None:
    layer, x = make_layer(dtype, bias), inputs(dtype)
    expected = rounded(x.flatten(0, 1)) @ layer.dequantized().t() + (layer.bias.float() if bias else 0)
    found = layer(x)
    assert found.dtype == dtype and found.shape == (2, 7, WIDTHS[1])
    for one, other in zip(found.flatten(0, 1).float(), expected, strict=True):
        assert float((one - other).norm()) <= near * float(other.norm())


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_gradient_of_the_input(dtype: torch.dtype, near: float) -> None:
    """A factor in bfloat16 may fall to the other side of a border between two codes."""
    layer, x = make_layer(dtype), inputs(dtype).requires_grad_()
    grad = torch.randn(2, 7, WIDTHS[1]).to(dtype) * torch.logspace(-20, 3, 7)[:, None].to(dtype)
    layer(x).backward(grad)
    scales = layer.scales.view(torch.float32).t()
    codes = layer.dequantized() / scales.t()
    expected = rounded(grad.flatten(0, 1) * scales.to(dtype)) @ codes
    for one, other in zip(x.grad.flatten(0, 1).float(), expected, strict=True):
        assert float((one - other).norm()) <= near * float(other.norm())
    exact = grad.flatten(0, 1).float() @ layer.dequantized()
    assert 1e-3 < relative(x.grad.flatten(0, 1).float()[-1], exact[-1]) < 0.1


def test_e4m3_rounds_gradients_less_than_e5m2() -> None:
    layer = make_layer(torch.float32)
    codes = layer.weight.view(torch.float8_e4m3fn)
    grad = torch.randn(500, WIDTHS[1])
    errors = []
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        scale = grad.abs().amax(1, keepdim=True) / torch.finfo(kind).max
        ones, columns = torch.ones(1, WIDTHS[0]), codes.t().contiguous().t()
        found = torch._scaled_mm((grad / scale).to(kind), columns, scale, ones, out_dtype=torch.float32)
        errors.append(relative(found, grad @ codes.float()))
    assert errors == pytest.approx([0.026, 0.05], rel=0.1)


def test_a_gradient_that_is_no_whole_tensor() -> None:
    """As ``sum`` gives it: one number, seen everywhere."""
    layer, x = make_layer(torch.float32), torch.randn(3, WIDTHS[0], requires_grad=True)
    layer(x).sum().backward()
    assert relative(x.grad, layer.dequantized().sum(0).expand(3, -1)) < 0.1


def test_weights_are_near() -> None:
    torch.manual_seed(0)
    weight = torch.randn(WIDTHS[1], WIDTHS[0])
    weight[5] = 0
    linear = nn.Linear(*WIDTHS, bias=False)
    linear.weight.data = weight
    found = Fp8Linear(linear).dequantized()
    largest = weight.abs().amax(1, keepdim=True)
    assert bool(((found - weight).abs() <= weight.abs() / 15.9 + largest * 2**-17).all())
    assert relative(found, weight) < 0.03


def test_what_is_held_in_fp8(tmp_path: Path) -> None:
    base = load_base(BaseSource(str(make_base(tmp_path / "base")), quantization="fp8"), torch.bfloat16, CPU)
    held = [name for name, module in base.named_modules() if isinstance(module, Fp8Linear)]
    assert len(held) == 2 * 7 and type(base.lm_head) is nn.Linear
    before = base.model.layers[0].mlp.up_proj.dequantized()
    add_lora(base, 0, **LORA)
    base.to(torch.bfloat16)  # as DeepSpeed does
    up = base.model.layers[0].mlp.up_proj
    assert torch.equal(up.base_layer.dequantized(), before)
    trained = {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 14 and {parameter.dtype for parameter in trained.values()} == {torch.bfloat16}


def test_lora_starts_as_on_the_whole_base(tmp_path: Path) -> None:
    folder = str(make_base(tmp_path / "base"))
    bases = [load_base(BaseSource(folder, quantization=kind), torch.bfloat16, CPU) for kind in ("none", "fp8")]
    for base in bases:
        add_lora(base, 0, **LORA)
    whole, held = ({name: p for name, p in base.named_parameters() if "lora_" in name} for base in bases)
    assert all(torch.equal(held[name], value) for name, value in whole.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_row_reads_nearly_the_same(checkpointing: bool) -> None:
    """Through the answers' last layer too, and with recomputation bit for bit."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config("qwen2")).requires_grad_(False)
    add_lora(model, 0, **LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
    whole = run_row(recommender(model, "dense"), make_row(12))
    hold_in_fp8(model, CPU)
    held = run_row(recommender(model, "dense"), make_row(12))
    assert 0 < relative(held[0], whole[0]) < 0.15 and 0 < relative(held[1], whole[1]) < 0.35
    if checkpointing:
        again = run_row(recommender(model, "dense", checkpointing=True), make_row(12))
        assert torch.equal(again[0], held[0]) and torch.equal(again[1], held[1])


def test_a_device_without_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on ...\nmore")

    check_fp8(CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"fp8: its products give bfloat16 on GPUs, not torch.float32; take"):
        check_fp8(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch, "_scaled_mm", fails)
    with pytest.raises(ConfigError, match=r"no FP8 products .*only supported on \.\.\.\), .* 8.9 on; take model"):
        check_fp8(CPU, torch.float32)


def test_a_model_without_such_layers() -> None:
    model = AutoModelForCausalLM.from_config(
        model_config(hidden_size=40, head_dim=10, intermediate_size=24, num_key_value_heads=4)
    )
    with pytest.raises(ConfigError, match="no linear layers that it could hold"):
        hold_in_fp8(model, CPU)


def test_selective_recomputation_runs_no_product_twice() -> None:
    base = AutoModelForCausalLM.from_config(model_config())
    hold_in_fp8(base, CPU)
    add_lora(base, 0, **LORA)
    counts = {}
    for mode in (False, "selective", True):
        reader = recommender(base, "cpu", mode)
        with Counted() as counted:
            run_row(reader, make_row(12))
        counts[mode] = counted.fp8_products
    assert 0 < counts["selective"] == counts[False] < counts[True]
