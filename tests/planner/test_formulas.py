"""The planner's formulas against sums done by hand, for a small model whose sizes all differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.common import separate_workload, shared_workload
from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.planner.flops import Workload, forward_flops, last_layer_savings, training_flops
from trsr_dist.planner.hardware import CATALOGUE, CPU_PROCESS_BYTES, Hardware, hardware, recognize
from trsr_dist.planner.memory import (
    RankMemory,
    StepSettings,
    ZeroSetting,
    activation_bytes,
    bytes_sent_per_step,
    divided_weights,
    forward_bytes,
    key_value_bytes,
    layer_bytes_per_token,
    rank_memory,
    recommend,
    weight_bytes,
)
from trsr_dist.planner.shape import ATTENTION_MODULES, ModelShape

SHAPE = ModelShape(10, 3, 4, 2, head_dim=6, intermediate_size=14, vocab_size=50)
"""Linear weights of a layer: 240 + 2 * 120 + 240 + 3 * 140 = 1140."""
CONFIG = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 14,
    "vocab_size": 50,
}
STEP = StepSettings(7, "bfloat16", True, ATTENTION_MODULES, answers_only=True, dropout=False)
WORK = Workload(tokens=100, pairs=700, answers=5, users=2)
GB = 10**9


def test_parameters_by_hand() -> None:
    assert SHAPE.num_linear_parameters == 3420
    assert (SHAPE.num_layer_parameters, type(SHAPE.num_layer_parameters)) == (1140 + 20, int)
    assert tuple(SHAPE.linears) == (*ATTENTION_MODULES, "gate_proj", "up_proj", "down_proj")
    assert SHAPE.num_parameters == 3 * 1160 + 2 * 500 + 10
    assert replace(SHAPE, tied_embeddings=True).num_parameters == 3 * 1160 + 500 + 10
    assert replace(SHAPE, qkv_bias=True).num_layer_parameters == 1160 + 24 + 12 + 12
    assert replace(SHAPE, qk_norm=True).num_layer_parameters == 1160 + 12
    assert SHAPE.num_lora_parameters(4, ("q_proj", "down_proj")) == 3 * 4 * (34 + 24)
    assert SHAPE.num_lora_parameters(1, "all-linear") == 3 * (34 + 22 + 22 + 34 + 24 + 24 + 24)


def test_what_a_config_leaves_out() -> None:
    assert ModelShape.from_config(CONFIG) == ModelShape(12, 3, 4, 4, 3, 14, 50, False, False, False)
    grouped = ModelShape.from_config(CONFIG | {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True})
    assert grouped == ModelShape(12, 3, 4, 2, 6, 14, 50, True, False, False)
    uneven = ModelShape.from_config(CONFIG | {"hidden_size": 13})
    assert (uneven.head_dim, type(uneven.head_dim)) == (3, int)
    assert ModelShape.from_config(CONFIG | {"attention_bias": True}).qkv_bias
    kinds = {kind: ModelShape.from_config(CONFIG | {"model_type": kind}) for kind in ("llama", "qwen2", "qwen3")}
    assert [(shape.qkv_bias, shape.qk_norm) for shape in kinds.values()] == [
        (False, False),
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("missing", CONFIG)
def test_every_size_is_needed(missing: str) -> None:
    for value, kind in ((None, "gpt2"), (1.5, "unknown")):
        config = CONFIG | {missing: value} | ({"model_type": kind} if kind == "gpt2" else {})
        with pytest.raises(ModelError, match=rf"model config \({kind}\): {missing} is {value}, expected"):
            ModelShape.from_config(config)


def test_an_unknown_target_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        ModelError, match="'a_proj' is none of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down"
    ):
        SHAPE.num_lora_parameters(4, ("z_proj", "a_proj", "q_proj"))


def test_forward_flops_by_hand() -> None:
    attention = 4 * 3 * 4 * 6 * 700
    assert forward_flops(SHAPE, WORK) == 2 * 3420 * 100 + attention + 2 * 10 * 10
    assert forward_flops(SHAPE, WORK, 696) == 2 * 4116 * 100 + attention + 2 * 10 * 10
    assert forward_flops(SHAPE, WORK, full_head=True) == 2 * 3420 * 100 + attention + 2 * 10 * 5000
    saved = last_layer_savings(SHAPE, WORK, 90)
    assert forward_flops(SHAPE, WORK, answer_pairs=90) == forward_flops(SHAPE, WORK) - saved
    assert (saved, type(saved)) == (2 * (1140 - 240) * 95 + 4 * 4 * 6 * 610, int)


def test_training_flops_by_hand() -> None:
    attention, trained = 4 * 4 * 6 * 2100, 2 * 696 * 100
    forward = 2 * 4116 * 100 + attention + 200
    assert training_flops(SHAPE, WORK, 696) == 2 * forward + trained + attention
    assert training_flops(SHAPE, WORK, 696, recompute=True) == 3 * forward + trained + attention
    full = forward - 200 + 100_000
    assert training_flops(SHAPE, WORK, 696, full_head=True) == 2 * full + trained + attention
    short, last = forward - 229_560, 4 * 4 * 6 * (1400 + 90)
    assert training_flops(SHAPE, WORK, 696, answer_pairs=90) == 2 * short + trained + last
    assert training_flops(SHAPE, WORK, 696, recompute=True, answer_pairs=90) == 3 * short + trained + last


def test_workloads_by_hand() -> None:
    assert shared_workload(7, (3, 1, 5)) == Workload(16, 28 + (21 + 6) + (7 + 1) + (35 + 15), 3, 1)
    assert type(shared_workload(7, (3, 1, 5)).pairs) is int
    assert separate_workload(7, (3, 1, 5)) == Workload(30, 55 + 36 + 78, 3, 1)
    assert Workload(1, 2, 3, 4) + Workload(10, 20, 30, 40) == Workload(11, 22, 33, 44)
    assert Workload(3, 5, 7, 2).scaled(2.6) == Workload(8, 13, 18, 5)
    assert Workload() == Workload(0, 0, 0, 0)


def test_weights_by_hand() -> None:
    assert weight_bytes(SHAPE, "bfloat16") == weight_bytes(SHAPE, "float16") == 8980
    assert weight_bytes(SHAPE, "float32") == 17960
    assert weight_bytes(SHAPE, "bfloat16", "8bit") == 3420 + 2 * 1070
    four_bits = round(3420 * (4 + 1 / 8 + 1 / 512) / 8)
    assert weight_bytes(SHAPE, "bfloat16", "4bit") == four_bits + 2 * 1070
    assert weight_bytes(SHAPE, "float32", "4bit") == four_bits + 4 * 1070
    large = ModelShape.from_config(CONFIG | {"hidden_size": 4096, "intermediate_size": 11008})
    embeddings = large.num_parameters - large.num_linear_parameters
    found = weight_bytes(large, "bfloat16", "4bit") - 2 * embeddings
    assert found == round(large.num_linear_parameters * (0.5 + 1 / 64 + 1 / 4096)), "the float32 of 256 scales counts"


def test_divided_weights_by_hand() -> None:
    assert divided_weights(SHAPE, "bfloat16", 1) == 8980
    assert divided_weights(SHAPE, "bfloat16", 2) == 4490 + 2 * 1160 * 2
    assert divided_weights(SHAPE, "bfloat16", 8) == 1122 + 2 * 1160 * 2
    assert divided_weights(SHAPE, "float32", 8) == 2245 + 2 * 1160 * 4


def test_forward_and_cache_by_hand() -> None:
    assert forward_bytes(SHAPE, 7, 2) == 7 * 2 * (4 * 10 + 3 * 14 + 2 * 6)
    assert key_value_bytes(SHAPE, 5, "bfloat16") == 5 * 3 * 2 * (2 * 6) * 2
    assert key_value_bytes(SHAPE, 5, "float32") == 5 * 3 * 2 * (2 * 6) * 4


@pytest.mark.parametrize(
    ("targets", "inputs", "widths"),
    [
        (("o_proj",), 0, 24),
        (("q_proj",), 10, 10),
        (("k_proj",), 10, 10),
        (("v_proj",), 10, 10),
        (("gate_proj",), 10, 10),
        (("up_proj",), 10, 10),
        (("down_proj",), 14, 14),
        (("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"), 34, 54),
        ("all-linear", 34, 88),
    ],
)
def test_what_a_layer_keeps_by_hand(targets: tuple[str, ...] | str, inputs: int, widths: int) -> None:
    for size in (2, 4):
        without = 8 * 10 + size * (2 * (4 + 2) * 6 + 3 * 14)
        assert layer_bytes_per_token(SHAPE, size, targets, False, False) == without + size * inputs
        assert layer_bytes_per_token(SHAPE, size, targets, True, False) == without + (size + 1) * widths
        assert layer_bytes_per_token(SHAPE, size, targets, False, True) == without + size * 34
        both = layer_bytes_per_token(SHAPE, size, targets, True, True)
        assert both == without + size * 34 + (size + 1) * widths


def test_activations_by_hand() -> None:
    layer, last, gradients, inputs = 7 * 328, 7 * (4 * 10 + 2 * (10 + 24)), 7 * 2 * 2 * 24, 3 * 7 * 10 * 2
    everything = replace(STEP, recompute=False)
    dropped = replace(everything, target_modules=("q_proj", "o_proj"), dropout=True)
    for step, expected in (
        (STEP, inputs + layer + gradients + last),
        (replace(STEP, answers_only=False), inputs + layer + gradients),
        (everything, 2 * layer + last + gradients),
        (replace(everything, answers_only=False), 3 * layer + gradients),
        (dropped, 2 * 7 * (308 + 3 * 34) + last + gradients),
    ):
        assert activation_bytes(SHAPE, step, frozen_inputs=False) == expected
    assert STEP.quantization == "none"


WHOLE = RankMemory(8980, adapter=2002, gradients=2002, optimizer=12012, activations=4144)
FROZEN_INPUTS = {"activations": 4144 + 7 * 2 * (10 + 14)}


@pytest.mark.parametrize(
    ("zero", "changes"),
    [
        (ZeroSetting(0), {}),
        (ZeroSetting(1), {"optimizer": 1501}),
        (ZeroSetting(2), {"optimizer": 1501, "gradients": 250}),
        (ZeroSetting(3), {"optimizer": 1501, "gradients": 250, "weights": 5762} | FROZEN_INPUTS),
        (ZeroSetting(2, offload_optimizer=True), {"optimizer": 0, "gradients": 250, "host": 1501}),
        (
            ZeroSetting(3, offload_parameters=True),
            {"optimizer": 1501, "gradients": 250, "weights": 4640, "host": 5762} | FROZEN_INPUTS,
        ),
        (
            ZeroSetting(3, True, True),
            {"optimizer": 0, "gradients": 250, "weights": 4640, "host": 1501 + 5762} | FROZEN_INPUTS,
        ),
    ],
)
def test_memory_of_a_rank_by_hand(zero: ZeroSetting, changes: dict[str, int]) -> None:
    found = rank_memory(SHAPE, 1001, STEP, zero, 8)
    assert found == replace(WHOLE, **changes)
    assert found.device == found.weights + found.adapter + found.gradients + found.optimizer + found.activations


def test_memory_of_other_numbers() -> None:
    wide = rank_memory(SHAPE, 1001, replace(STEP, precision="float32"), ZeroSetting(1), 8)
    activations = 3 * 7 * 10 * 4 + 7 * (80 + 4 * 124) + 7 * 4 * 2 * 24 + 7 * (40 + 4 * 34)
    assert wide == RankMemory(17960, 4004, 4004, 1501, activations)
    four_bits = rank_memory(SHAPE, 1001, replace(STEP, quantization="4bit"), ZeroSetting(2), 8)
    assert four_bits.weights == weight_bytes(SHAPE, "bfloat16", "4bit")
    all_kept = rank_memory(SHAPE, 1001, replace(STEP, recompute=False), ZeroSetting(1), 8)
    assert all_kept == replace(WHOLE, optimizer=1501, activations=6020)


def test_the_first_that_fits() -> None:
    choices = {
        "large": RankMemory(0, 0, 0, 0, 200),
        "one": RankMemory(50, 20, 10, 5, 15),
        "other": RankMemory(1, 0, 0, 0, 0),
    }
    assert recommend(choices, 200) == "large"
    assert recommend(choices, 199) == recommend(choices, 100) == "one"
    assert recommend(choices, 99) == "other"
    assert recommend(choices, 0) == ""


def test_bytes_sent_by_hand() -> None:
    def sent(world_size: int, stage: int, rows_per_rank: int = 1, precision: str = "bfloat16") -> int:
        return bytes_sent_per_step(SHAPE, 1001, world_size, stage, rows_per_rank, precision)

    assert sent(4, 2) == 2 * 1001 * 2 * 3 / 4
    assert sent(4, 2, precision="float32") == 2 * 1001 * 4 * 3 / 4
    assert sent(4, 3) == (2 * 1001 + 2 * 4490) * 2 * 3 / 4
    assert sent(4, 3, rows_per_rank=3) == (2 * 1001 + 2 * 3 * 4490) * 2 * 3 / 4
    assert sent(3, 1) == 2669, "rounded"
    assert sent(2, 1) == 2 * 1001
    assert sent(1, 3) == 0


def test_the_catalogue_is_that_of_the_data_sheets() -> None:
    tera = 10**12
    assert {
        name: (
            device.flops_per_second / tera,
            device.memory_bytes / GB,
            device.memory_bytes_per_second / GB,
            device.node_bytes_per_second / GB,
            device.network_bytes_per_second / GB,
            device.computing_in("float32").flops_per_second / tera,
        )
        for name, device in CATALOGUE.items()
    } == {
        "v100-32gb": (15.7, 32, 900, 150, 12.5, 15.7),
        "a100-40gb": (312, 40, 1555, 300, 25, 19.5),
        "a100-80gb": (312, 80, 2039, 300, 25, 19.5),
        "l40s": (362, 48, 864, 32, 25, 91.6),
        "h100": (989, 80, 3350, 450, 50, 67),
        "h200": (989, 141, 4800, 450, 50, 67),
    }
    assert all(hardware(name) is device for name, device in CATALOGUE.items())
    for device in CATALOGUE.values():
        assert device.precision == ("float32" if device.name == "v100-32gb" else "bfloat16"), "what it can compute in"
        assert device.utilization == 0.4
        assert (device.process_bytes, device.is_cpu) == (2_147_483_648, False)
    assert CPU_PROCESS_BYTES == 0.6 * GB, "a core's processes load no CUDA"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla K80", None),
        ("NVIDIA H1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_devices_are_recognized_by_what_the_driver_says(name: str, found: str | None) -> None:
    assert recognize(name) == (CATALOGUE[found] if found else None)


def test_a_described_device() -> None:
    text = "flops=400e12,memory=96e9,bandwidth=4e12,node=300e9,network=50e9"
    assert hardware(text) == Hardware("described", 400e12, 96e9, 4e12, 300e9, 50e9)
    assert hardware(text.replace("300e9", "0.5")).node_bytes_per_second == 0.5
    for value, message in (
        ("0", "above 0"),
        ("-1", "above 0"),
        ("nan", "finite numbers"),
        ("inf", "finite numbers"),
        ("1=2", "could not convert .*'1=2'"),
        ("fast", "could not convert .*'fast'; expected numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            hardware(text.replace("300e9", value))
    with pytest.raises(ConfigError, match="found speed, expected flops, memory, bandwidth, node, network"):
        hardware("speed=1")
    with pytest.raises(ConfigError, match=r"expected one of v100-32gb, .*, or a description with flops=, memory="):
        hardware("h1000")
