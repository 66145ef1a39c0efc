"""The planner's counts against real models and against a count by brute force."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from benchmarks.common import separate_workload, shared_workload
from tests.model.world import make_row
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.planner.flops import Workload, forward_flops, last_layer_savings, training_flops
from trsr_dist.planner.memory import StepSettings
from trsr_dist.planner.shape import ATTENTION_MODULES, ModelShape

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "head_dim": 16,
}
STEP = StepSettings(8, "bfloat16", True, ATTENTION_MODULES, answers_only=True, dropout=False)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_exactly(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    shape = ModelShape.from_config(CONFIGS[name].to_dict())
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
    assert shape.num_parameters == frozen
    assert shape.num_lora_parameters(4, ("q_proj", "down_proj")) == trainable


def test_the_llama_2_7b_shape() -> None:
    config = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
    assert ModelShape.from_config(config).num_parameters == 6_738_415_616


def test_linear_flops_agree_with_torchs_counter() -> None:
    shape = ModelShape.from_config(CONFIGS["llama"].to_dict())
    model = LlamaForCausalLM(CONFIGS["llama"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 50, dtype=torch.long))
    counted = counter.get_total_flops()
    attention_by_blocks = 4 * shape.num_layers * shape.num_heads * shape.head_dim * 50 * 50
    work = Workload(tokens=50, pairs=50 * 51 // 2, answers=1, users=1)
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * work.pairs
    found = forward_flops(shape, work, full_head=True)
    # torch's counter reports the attention operator on CPU as zero, or as the whole square.
    assert counted in (found - attention, found - attention + attention_by_blocks)


def test_the_last_layers_savings_agree_with_torchs_counter() -> None:
    """Linear modules only: torch counts no operation for the attention of this back end."""
    model, row = Recommender(LlamaForCausalLM(CONFIGS["llama"]), (3, 4), "cpu").eval(), make_row()
    inputs = RowInputs(row, torch.device("cpu"))
    counts = []
    for answers_only in (False, True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.states(inputs, answers_only)
        counts.append(counter.get_total_flops())
    work = Workload(tokens=row.num_tokens, pairs=0, answers=row.num_answers)
    shape = ModelShape.from_config(CONFIGS["llama"].to_dict())
    assert counts[0] - counts[1] == last_layer_savings(shape, work, 0)
    attention = last_layer_savings(shape, Workload(pairs=1000), 10)
    assert attention == 4 * shape.num_heads * shape.head_dim * 990


@pytest.mark.parametrize("build", [shared_workload, separate_workload])
def test_pairs_by_brute_force(build) -> None:  # noqa: ANN001
    prefix, suffixes = 7, (3, 1, 5)
    if build is separate_workload:
        expected = sum(np.tril(np.ones((prefix + s, prefix + s))).sum() for s in suffixes)
    else:
        size = prefix + sum(suffixes)
        mask = np.zeros((size, size))
        mask[:prefix, :prefix] = np.tril(np.ones((prefix, prefix)))
        start = prefix
        for s in suffixes:
            mask[start : start + s, :prefix] = 1
            mask[start : start + s, start : start + s] = np.tril(np.ones((s, s)))
            start += s
        expected = mask.sum()
    assert build(prefix, suffixes).pairs == expected


def test_sharing_saves_more_with_more_candidates() -> None:
    shape = ModelShape.from_config(CONFIGS["llama"].to_dict())

    def gain(num: int) -> float:
        shared, separate = shared_workload(1024, (64,) * num), separate_workload(1024, (64,) * num)
        return training_flops(shape, separate, 100) / training_flops(shape, shared, 100)

    assert 1 < gain(2) < gain(5) < gain(21) < 21
