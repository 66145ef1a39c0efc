"""Memory of one rank by ZeRO stage (arXiv 1910.02054), for LoRA on a frozen base, and what it sends in a step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from trsr_dist.planner.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number."""
QUANTIZED_BITS = {"4bit": 4 + 8 / 64 + 32 / (64 * 256), "8bit": 8.0, "fp8": 8.0}
"""Of a weight in a linear module. NF4 with double quantization (arXiv 2305.14314): an 8-bit scale for 64 weights, and a
float32 one for 256 of these. LLM.int8 (arXiv 2208.07339): its scale of a row is not counted."""
KEPT_BY_CPU = 3
"""A process on CPU cores keeps up to this multiple of what it needs, where the machine has it free (see
``environment.return_large_blocks``): 5.1 GB of 1.9 were measured."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank; ``host`` is what offloading moves out of the device."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class ZeroSetting:
    """What of the training state is divided over the ranks, and what leaves the device."""

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What the memory of a training step depends on, beside model, adapter and ranks."""

    row_tokens: int
    precision: str
    recompute: bool | Literal["selective"]
    """``train.activation_checkpointing``."""
    target_modules: Collection[str] | str
    """With LoRA layers: these need their inputs."""
    answers_only: bool
    """The last layer runs at the answers, of which there are few, and keeps inputs, keys and values."""
    dropout: bool
    """On the inputs of the LoRA layers."""
    quantization: str = "none"
    """Of the base."""
    compiled: bool = False
    """``model.compile``."""


def rank_memory(
    shape: ModelShape, num_lora_parameters: int, step: StepSettings, zero: ZeroSetting, world_size: int
) -> RankMemory:
    """Bytes of one rank in one training step on a row.

    Stage 1 divides the optimizer's state (float32 master copy and two moments), 2 also the gradients, 3 also the
    weights; at stage 3 the weights of two layers are whole at a time, and DeepSpeed's linear layers keep the inputs of
    frozen weights too. The base may be quantized below stage 3.
    """
    size = BYTES[step.precision]
    if zero.stage >= 3:
        weights = divided_weights(shape, step.precision, world_size)
    else:
        weights = weight_bytes(shape, step.precision, step.quantization)
    gradients = num_lora_parameters * size // (world_size if zero.stage >= 2 else 1)
    optimizer = num_lora_parameters * 12 // (world_size if zero.stage >= 1 else 1)
    host = (optimizer if zero.offload_optimizer else 0) + (weights if zero.offload_parameters else 0)
    return RankMemory(
        weights=2 * shape.num_layer_parameters * size if zero.offload_parameters else weights,
        adapter=num_lora_parameters * size,
        gradients=gradients,
        optimizer=0 if zero.offload_optimizer else optimizer,
        activations=activation_bytes(shape, step, zero.stage >= 3),
        host=host,
    )


def weight_bytes(shape: ModelShape, precision: str, quantization: str = "none") -> int:
    """All weights of the base.

    Args:
        shape: the base model.
        precision: of what is not quantized: embeddings, output head, norms, biases.
        quantization: of the linear modules of the layers; ``none``, ``4bit``, ``8bit`` or ``fp8``.
    """
    if quantization == "none":
        return shape.num_parameters * BYTES[precision]
    linear = shape.num_linear_parameters
    quantized = round(linear * QUANTIZED_BITS[quantization] / 8)
    if quantization == "fp8":  # a float32 scale for each output
        quantized += 4 * shape.num_layers * sum(outputs for _, outputs in shape.linears.values())
    return quantized + (shape.num_parameters - linear) * BYTES[precision]


def divided_weights(shape: ModelShape, precision: str, world_size: int) -> int:
    """Bytes of a rank's share of the weights under ZeRO-3, and of the two layers that are whole at a time."""
    whole = 2 * shape.num_layer_parameters * BYTES[precision] if world_size > 1 else 0
    return weight_bytes(shape, precision) // world_size + whole


def forward_bytes(shape: ModelShape, row_tokens: int, size: int) -> int:
    """What a forward pass without gradients holds of a row at its widest place, the MLP: the embeddings, the layer's
    input, the residual, the MLP's input, three of its activations, and the rotary tables."""
    widths = 4 * shape.hidden_size + 3 * shape.intermediate_size + 2 * shape.head_dim
    return row_tokens * size * widths


def key_value_bytes(shape: ModelShape, num_tokens: int, precision: str) -> int:
    """Keys and values of all layers that generation keeps for a number of tokens."""
    return num_tokens * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * BYTES[precision]


def activation_bytes(shape: ModelShape, step: StepSettings, frozen_inputs: bool) -> int:
    """What the backward pass needs of a row, and what it makes in the layer where it is.

    With recomputation every layer keeps its input only, selectively also its attention and its large products, and one
    layer at a time the rest.

    Args:
        shape: the base model.
        step: its row, and what of it is kept.
        frozen_inputs: linear layers without LoRA keep their inputs too (ZeRO-3).
    """
    row_tokens, size = step.row_tokens, BYTES[step.precision]
    products = row_tokens * product_bytes_per_token(shape, size)
    layer = row_tokens * layer_bytes_per_token(shape, size, step.target_modules, step.dropout, frozen_inputs)
    if step.compiled:  # what is cheap is computed again where it is needed
        layer = products + row_tokens * shape.hidden_size * size
    keys = 2 * shape.num_kv_heads * shape.head_dim
    last = row_tokens * (4 * shape.hidden_size + size * (shape.hidden_size + keys)) if step.answers_only else layer
    gradients = row_tokens * size * 2 * (shape.intermediate_size + shape.hidden_size)
    whole_layers = shape.num_layers - step.answers_only
    if not step.recompute:
        return whole_layers * layer + (last if step.answers_only else 0) + gradients
    kept = products if step.recompute == "selective" else 0
    inputs = shape.num_layers * row_tokens * shape.hidden_size * size
    return inputs + whole_layers * kept + max(0, layer - kept) + gradients + (last if step.answers_only else 0)


def product_bytes_per_token(shape: ModelShape, size: int) -> int:
    """What selective recomputation keeps of a layer: queries, keys, values, the attention's output with its float32
    log-sum-exp, that of o_proj, and both products of the MLP."""
    attention = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    return size * (attention + shape.hidden_size + 2 * shape.intermediate_size) + 4 * shape.num_heads


def layer_bytes_per_token(
    shape: ModelShape, size: int, target_modules: Collection[str] | str, dropout: bool, frozen_inputs: bool
) -> int:
    """A layer keeps the inputs of its two norms in float32, queries, keys, values and the attention's output, three
    activations of the MLP, and the inputs of the modules with LoRA layers: with dropout each its own one, and a mask
    of a byte a value. With ``frozen_inputs`` it keeps the inputs of all linear modules, dropped out or not."""
    names = set(shape.linears) if target_modules == "all-linear" else set(target_modules)
    attention = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    kept = 8 * shape.hidden_size + size * (attention + 3 * shape.intermediate_size)
    if frozen_inputs or not dropout:
        # Shared inputs are kept once; that of o_proj is the attention's output, which is counted above.
        read = set(shape.linears) if frozen_inputs else names
        groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
        kept += size * sum(shape.linears[group[0]][0] for group in groups if set(group) & read)
    if dropout:
        kept += (size + 1) * sum(shape.linears[name][0] for name in names)
    return kept


def recommend(choices: dict[str, RankMemory], available_bytes: int) -> str:
    """The first choice that fits, in the given order; empty where none does."""
    fitting = (name for name, memory in choices.items() if memory.device <= available_bytes)
    return next(fitting, "")


def bytes_sent_per_step(
    shape: ModelShape,
    num_lora_parameters: int,
    world_size: int,
    stage: int,
    rows_per_rank: int,
    precision: str,
) -> int:
    """Ring collectives: an all-reduce sends ``2 (w-1)/w`` of its operand, an all-gather or reduce-scatter half of that.

    Only the adapter has gradients. Stage 3 gathers the weights twice a row: for the forward and for the backward pass.
    """
    size, ring = BYTES[precision], (world_size - 1) / world_size
    sent = 2 * num_lora_parameters * size * ring
    if stage >= 3:
        sent += 2 * rows_per_rank * shape.num_parameters * size * ring
    return round(sent)
