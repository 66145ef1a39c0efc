"""Planned activations against what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trsr_dist.benchmarks.ways import ANSWERS, make_user
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.lora import add_lora
from trsr_dist.model.recommender import Recommender
from trsr_dist.planning.memory import KeptActivations, activation_bytes
from trsr_dist.planning.shape import ATTENTION_MODULES, ModelShape
from trsr_dist.rows import pack_row

CONFIG = LlamaConfig(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=704,
    vocab_size=2048,
)


def kept_bytes(targets: tuple[str, ...] | str, answers_only: bool, dropout: float) -> tuple[int, int]:
    """Bytes of the tensors that a forward pass keeps, parameters left out, and the row's tokens."""
    causal = AutoModelForCausalLM.from_config(CONFIG)
    add_lora(causal, 4, 16, dropout, targets, False, 0)
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
        states = model._states(RowInputs(row, torch.device("cpu")), answers_only)
    assert states.requires_grad
    return sum(map(num_bytes, kept.values())), row.num_tokens


@pytest.mark.parametrize("targets", [ATTENTION_MODULES, ("q_proj", "v_proj"), "all-linear"])
@pytest.mark.parametrize("answers_only", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_are_those_that_autograd_keeps(
    targets: tuple[str, ...] | str, answers_only: bool, dropout: float
) -> None:
    found, num_tokens = kept_bytes(targets, answers_only, dropout)
    shape = ModelShape.from_config(CONFIG.to_dict())
    gradients = num_tokens * 4 * 2 * (shape.intermediate_size + shape.hidden_size)
    planned = activation_bytes(shape, num_tokens, 4, KeptActivations(False, targets, answers_only, dropout > 0))
    planned -= gradients
    assert planned == pytest.approx(found, rel=0.08)
