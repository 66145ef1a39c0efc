"""Liger's kernels against the stock layers, in Triton's interpreter on the CPU: ``make test-kernels``."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from tests.model.world import CONFIGS, CPU, gradients, make_model, make_user, model_config, recommender, relative
from tests.spawn import run_ranks
from tests.train.test_equal_losses import STAGES
from tests.train.world import link_run, losses_of, make_config, make_run, train_all
from trsr_dist.environment import interprets_triton
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.kernels import choose_kernels, use_kernels
from trsr_dist.model.recommender import Recommender
from trsr_dist.rows import pack_row

pytest.importorskip("liger_kernel")
if not interprets_triton():
    pytest.skip("make test-kernels runs it", allow_module_level=True)

ROW = pack_row([make_user("a", 22, (4, 6), 6), make_user("b", 13, (5,), 6), make_user("c", 9, (2, 2, 2), 6)])


def fit_interpreter() -> None:
    """The compiler makes float arguments float32, and knows CUDA's reciprocal root. The interpreter leaves the former
    Python's, on which Liger calls ``to``, and has only Triton's own root."""
    import numpy as np
    from liger_kernel.ops import rms_norm
    from triton import language
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def convert(value: object) -> object:
        if not isinstance(value, float):
            return plain(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), language.float32)
        return language.tensor(handle, language.float32)

    interpreter._implicit_cvt = convert
    rms_norm.rsqrt = lambda value: language.rsqrt(value)  # the interpreter replaces it while a kernel runs


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> None:
    fit_interpreter()


def fused(model: torch.nn.Module, checkpointing: bool = False) -> Recommender:
    reader = recommender(model, "dense", checkpointing)
    assert use_kernels(reader.causal)
    return reader


def run(model: Recommender, answers_only: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's output, and the LoRA gradients of a product with fixed random numbers."""
    model.zero_grad()
    states = model.states(RowInputs(ROW, CPU), answers_only)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.dtype)
    (states * weights).sum().backward()
    return states.detach().float(), gradients(model)


def assert_equal(model: torch.nn.Module, answers_only: bool, checkpointing: bool = False) -> None:
    found, expected = run(fused(model, checkpointing), answers_only), run(recommender(model, "dense"), answers_only)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert relative(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_float32_equals_the_stock_layers(kind: str) -> None:
    model = make_model(model_config(kind), targets="all")
    assert choose_kernels("liger", CPU, model.config)
    assert_equal(model, answers_only=True)


@pytest.mark.parametrize("rope", ["", "yarn"])
def test_all_positions_of_the_last_layer_too(rope: str) -> None:
    """As the loss of the full text reads them. YaRN's tables are longer than one."""
    assert_equal(make_model(model_config(rope=rope)), answers_only=False)


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_equal_with_recomputed_activations(targets: str) -> None:
    assert_equal(make_model(model_config("qwen3"), targets=targets), answers_only=True, checkpointing=True)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_float16_is_as_near_to_float32_as_the_stock_layers_are(kind: str) -> None:
    """It takes the casts of bfloat16, in which the interpreter has no arithmetic: ``tests/gpu``."""
    exact = run(recommender(make_model(model_config(kind), targets="all"), "dense"))
    model = make_model(model_config(kind), torch.float16, "all")
    found, stock = run(fused(model)), run(recommender(model, "dense"))
    for one, other, truth in zip(found, stock, exact, strict=True):
        assert 0 < relative(one, truth) < 1.5 * relative(other, truth)


def test_no_other_model_is_changed() -> None:
    model, before = make_model(model_config()), dict(vars(modeling_llama))
    other = copy.deepcopy(model)
    bound = use_kernels(model)
    assert len(bound) == 3 * (2 + 1 + 1) + 1, "norms, MLP and attention of three layers, and the last norm"
    assert dict(vars(modeling_llama)) == before
    fresh = AutoModelForCausalLM.from_config(model_config())
    assert not any("forward" in vars(module) for kept in (other, fresh) for module in kept.modules())
    for module in bound:
        del module.forward
    assert torch.equal(run(recommender(model, "dense"))[0], run(recommender(other, "dense"))[0])


def test_the_kernels_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three is called in every layer; the answers' layer rotates by itself."""
    from liger_kernel.transformers import functional

    calls = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.append(name), original(*args, **kwargs))[1]

    for name in ("liger_rms_norm", "liger_swiglu", "liger_rope"):
        monkeypatch.setattr(functional, name, counted(name, getattr(functional, name)))
    run(fused(make_model(model_config())))
    assert {name: calls.count(name) for name in calls} == {"liger_rms_norm": 7, "liger_swiglu": 3, "liger_rope": 2}


def train_interpreted(rank: int, world_size: int, runs: list[Path]) -> None:
    fit_interpreter()
    train_all(rank, world_size, runs)


@pytest.mark.parametrize("stage", [name for name in STAGES if "offload" not in name])
def test_losses_under_zero_are_those_of_the_stock_layers(stage: str, tmp_path: Path) -> None:
    source = make_run(tmp_path / "source", num_users=20)
    for kernels in ("none", "liger"):
        run = link_run(tmp_path / kernels, source)
        (run / "ds.json").write_text(json.dumps({"zero_optimization": STAGES[stage]}))
        train = {"max_steps": 2, "row_tokens": 310, "rows_per_step": 1, "deepspeed_config": str(run / "ds.json")}
        make_config(run, model={"name_or_path": "RUN/base", "kernels": kernels}, train=train)
    run_ranks(train_interpreted, 1, [tmp_path / "none", tmp_path / "liger"])
    expected = losses_of(tmp_path / "none")
    assert sorted(expected) == [1, 2] and losses_of(tmp_path / "liger") == pytest.approx(expected, abs=1e-5)
