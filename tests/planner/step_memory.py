"""A step on CPU cores in its own process: prints the memory that it takes at most and what is planned, in bytes."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import peak_bytes
from benchmarks.ways import ANSWERS, make_user
from trsr_dist.config.sections import LoraSection
from trsr_dist.environment import return_large_blocks
from trsr_dist.model.adapters import add_lora
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.planner.memory import StepSettings, activation_bytes
from trsr_dist.planner.shape import ATTENTION_MODULES, ModelShape
from trsr_dist.rows import pack_row

CONFIG = LlamaConfig(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=704,
    vocab_size=2048,
)


def step(model: Recommender, num_users: int) -> int:
    """Forward and backward of a row; its number of tokens."""
    row = pack_row([make_user(f"user {number}", 390, (12, 9), 20) for number in range(num_users)])
    model(RowInputs(row, torch.device("cpu")), "pair").square().mean().backward()
    return row.num_tokens


def main() -> None:
    return_large_blocks()
    causal = AutoModelForCausalLM.from_config(CONFIG)
    add_lora(causal, 0, **LoraSection(r=4, dropout=0.0).model_dump())
    model = Recommender(causal, ANSWERS, "cpu").train()
    step(model, 1)  # loads the libraries' kernels
    before = peak_bytes()
    num_tokens = step(model, 20)
    settings = StepSettings(num_tokens, "float32", False, ATTENTION_MODULES, answers_only=True, dropout=False)
    planned = activation_bytes(ModelShape.from_config(CONFIG.to_dict()), settings, frozen_inputs=False)
    print(peak_bytes() - before, planned)


if __name__ == "__main__":
    main()
