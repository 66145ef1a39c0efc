"""Planned memory against what autograd keeps, what a forward pass allocates, what a process on CPU cores holds at most,
and what bitsandbytes stores."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks.ways import ANSWERS, make_user
from tests.planner.step_memory import CONFIG
from trsr_dist.config.sections import LoraSection
from trsr_dist.model.adapters import add_lora
from trsr_dist.model.compilation import compile_layers, warm_up
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.loading import load_base
from trsr_dist.model.recommender import Recommender, enable_recomputation
from trsr_dist.planner.hardware import CPU_PROCESS_BYTES
from trsr_dist.planner.memory import (
    StepSettings,
    ZeroSetting,
    activation_bytes,
    forward_bytes,
    key_value_bytes,
    rank_memory,
    weight_bytes,
)
from trsr_dist.planner.shape import ATTENTION_MODULES, ModelShape
from trsr_dist.pretrained import BaseSource
from trsr_dist.rows import pack_row
from trsr_dist.train import model as train_model


def kept_bytes(targets: tuple[str, ...] | str, answers_only: bool, dropout: float) -> tuple[int, int]:
    """Bytes of the tensors that a forward pass keeps, parameters left out, and the row's tokens."""
    causal = AutoModelForCausalLM.from_config(CONFIG)
    add_lora(causal, 0, **LoraSection(r=4, dropout=dropout, target_modules=targets).model_dump())
    model = Recommender(causal, ANSWERS, "cpu").train()
    row = pack_row([make_user(f"user {number}", 90, (12, 9), 20) for number in range(4)])
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def num_bytes(tensor: torch.Tensor) -> int:
        """A dropout mask is of floats on a CPU; on a GPU, for which the planner counts, of bytes."""
        is_mask = dropout > 0 and bool(((tensor == 0) | (tensor == 1 / (1 - dropout))).all())
        return tensor.numel() if is_mask else tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.states(RowInputs(row, torch.device("cpu")), answers_only)
    assert states.requires_grad
    return sum(map(num_bytes, kept.values())), row.num_tokens


@pytest.mark.parametrize("targets", [ATTENTION_MODULES, ("q_proj", "v_proj"), "all-linear"])
@pytest.mark.parametrize("answers_only", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("stage", [1, 3])
def test_activations_are_those_that_autograd_keeps(
    targets: tuple[str, ...] | str, answers_only: bool, dropout: float, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stage == 3:
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)  # as zero.Init does, until the end
    found, num_tokens = kept_bytes(targets, answers_only, dropout)
    shape = ModelShape.from_config(CONFIG.to_dict())
    gradients = num_tokens * 4 * 2 * (shape.intermediate_size + shape.hidden_size)
    step = StepSettings(num_tokens, "float32", False, targets, answers_only, dropout > 0)
    planned = rank_memory(shape, 0, step, ZeroSetting(stage), 1).activations - gradients
    assert planned == pytest.approx(found, rel=0.08)


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library returns memory in its own way")
def test_a_process_on_cpu_cores_holds_what_is_planned() -> None:
    command = [sys.executable, "-m", "tests.planner.step_memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, planned = map(int, done.stdout.split())
    assert peak == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize(("planned", "is_scarce"), [(3 * 10**9, False), (3 * 10**9 + 1, True)])
def test_freed_memory_is_returned_where_the_node_has_too_little(
    planned: int, is_scarce: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(train_model, "available_memory_bytes", lambda: 2 * (3 * 3 * 10**9 + CPU_PROCESS_BYTES))
    monkeypatch.setattr(train_model, "return_large_blocks", lambda: calls.append(1))
    train_model.spare_memory(planned, ranks_on_node=2)
    assert bool(calls) == is_scarce


@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
    ids=["eager", "compiled"],
)
@pytest.mark.parametrize("recompute", [False, "selective", True])
def test_a_step_holds_what_is_planned(recompute: bool | str, compiled: bool) -> None:
    """A longer model, so that what a layer keeps outweighs what one layer needs at a time."""
    config = LlamaConfig(**(CONFIG.to_dict() | {"num_hidden_layers": 8}))
    causal = AutoModelForCausalLM.from_config(config)
    add_lora(causal, 0, **LoraSection(r=4, dropout=0.0).model_dump())
    if recompute is True or (recompute and not compiled):
        enable_recomputation(causal, selective=recompute == "selective")
    model = Recommender(causal, ANSWERS, "cpu").train()
    if compiled:
        compile_layers(model)
        warm_up(model, answers_only=True)
    row = pack_row([make_user(f"user {number}", 390, (12, 9), 20) for number in range(10)])
    inputs = RowInputs(row, torch.device("cpu"))
    model(inputs, "pair").square().mean().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(inputs, "pair").square().mean().backward()
    step = StepSettings(row.num_tokens, "float32", recompute, ATTENTION_MODULES, True, False, compiled=compiled)
    planned = activation_bytes(ModelShape.from_config(config.to_dict()), step, frozen_inputs=False)
    assert planned == pytest.approx(peak_of(profiler), rel=0.15)


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 512, "intermediate_size": 1408}, {"intermediate_size": 512}])
def test_a_forward_pass_holds_what_is_planned(sizes: dict[str, int]) -> None:
    config = LlamaConfig(**(CONFIG.to_dict() | sizes))
    model = Recommender(AutoModelForCausalLM.from_config(config), ANSWERS, "cpu").eval()
    row = pack_row([make_user(f"user {number}", 200, (12, 9, 30) * 4, 20) for number in range(4)])
    inputs = RowInputs(row, torch.device("cpu"))
    with torch.no_grad():
        model(inputs, "pair")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(inputs, "pair")
    planned = forward_bytes(ModelShape.from_config(config.to_dict()), row.num_tokens, 4)
    assert planned == pytest.approx(peak_of(profiler), rel=0.05)


def peak_of(profiler: profile) -> int:
    """Most bytes that were allocated and not yet freed."""
    events = profiler.profiler.kineto_results.events()
    held = most = 0
    for _, num_bytes in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += num_bytes
        most = max(most, held)
    return most


def test_keys_and_values_are_those_of_the_cache() -> None:
    config = LlamaConfig(**CONFIG.to_dict())
    model, cache = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(3, 40, dtype=torch.long), None, None, cache)
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert key_value_bytes(ModelShape.from_config(CONFIG.to_dict()), 3 * 40, "float32") == found


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit", "fp8"])
def test_weights_are_those_of_the_loaded_base(quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    AutoModelForCausalLM.from_config(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path)
    source = BaseSource(str(tmp_path), quantization=quantization)
    base = load_base(source, torch.bfloat16, torch.device("cpu"))
    found = sum(parameter.nbytes for parameter in base.parameters())
    states = (getattr(parameter, "quant_state", None) for parameter in base.parameters())
    found += sum(buffer.nbytes for name, buffer in base.named_buffers() if name.endswith("scales"))
    found += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states if state is not None)
    planned = weight_bytes(ModelShape.from_config(CONFIG.to_dict()), "bfloat16", quantization)
    assert planned == pytest.approx(found, rel=0.002)
