"""Small models with trained-looking LoRA layers, and rows to read."""

from __future__ import annotations

import copy
import random

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender, enable_recomputation
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow, pack_row

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
}
VOCABULARY = 300
ANSWERS = (3, 4)
CPU = torch.device("cpu")


def model_config(kind: str = "llama", rope: str = "", **settings: object) -> PretrainedConfig:
    """Grouped-query attention, three layers, weights large enough that attention is not uniform."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.1,
    }
    rope_parameters = {"rope_parameters": ROPES[rope]} if rope else {}
    return CONFIGS[kind](**(sizes | rope_parameters | settings))


def make_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32, targets: str = "attention") -> nn.Module:
    """A base with LoRA layers whose B is not zero."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    modules = "all-linear" if targets == "all" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=modules), base)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
        parameter.requires_grad_("lora_" in name)
    return base.to(dtype)


def recommender(model: nn.Module, backend: str | None, checkpointing: bool | str = False) -> Recommender:
    """A copy of the model that reads rows, in training mode."""
    model = copy.deepcopy(model)
    if checkpointing:
        enable_recomputation(model, selective=checkpointing == "selective")
    return Recommender(model, ANSWERS, backend).train()


def make_user(name: str, prefix: int, suffixes: tuple[int, ...], head: int = 0) -> TokenizedUser:
    """Random tokens, of which the first ``head`` are the same for every user."""
    draw = random.Random(name)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, VOCABULARY) for _ in range(count))

    labels = tuple(int(number == 0) for number in range(len(suffixes)))
    items = tuple(f"{name}{number}" for number in range(len(suffixes)))
    shared = tuple(range(10, 10 + head))
    return TokenizedUser(name, shared + tokens(prefix - head), tuple(map(tokens, suffixes)), labels, items)


def make_row(head: int = 0) -> PackedRow:
    """Four users: prefixes and suffixes of all lengths, one with a single candidate, one with equal ones."""
    return pack_row(
        [
            make_user("a", 150, (9, 14, 3), head),
            make_user("b", 31, (40, 5), head),
            make_user("c", 70, (7,), head),
            make_user("d", 22, (6, 6, 6, 6), head),
        ]
    )


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])


def run(model: Recommender, row: PackedRow, want: str = "logits") -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs, and the LoRA gradients of the answers' cross-entropy."""
    inputs = RowInputs(row, CPU)
    output = model(inputs, want)
    targets = torch.where(inputs.labels > 0, *model.answer_ids) if want == "logits" else 1 - inputs.labels
    nn.functional.cross_entropy(output.float(), targets, reduction="sum").backward()
    return output.detach().float(), gradients(model)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 difference."""
    return float((found - expected).norm() / expected.norm())


class Counted(TorchDispatchMode):
    """Counts forward attentions, and products by the base's matrices in forward direction; of an FP8 base in both."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.products = self.fp8_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.attention += func is torch.ops.trsr_dist.tree_attention.default
        self.fp8_products += func is torch.ops.aten._scaled_mm.default
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.products += min(args[-1].shape) > 4 and args[-1].stride(0) == 1
        return func(*args, **kwargs or {})
