"""Memory of one rank by ZeRO stage (arXiv 1910.02054), for LoRA on a frozen base."""

from __future__ import annotations

from dataclasses import dataclass

from trsr_dist.planning.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FRAMEWORK_BYTES = 2 * 1024**3
"""CUDA context, NCCL buffers and the allocator's slack, as commonly seen; not measured by this project."""


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


def rank_memory(
    shape: ModelShape,
    num_lora_parameters: int,
    row_tokens: int,
    world_size: int,
    zero: ZeroSetting,
    precision: str = "bfloat16",
    recompute: bool = True,
) -> RankMemory:
    """Bytes of one rank in one training step on a row of ``row_tokens`` tokens.

    Stage 1 divides the optimizer's state (float32 master copy and two moments), 2 also the gradients, 3 also the
    weights; at stage 3 the weights of two layers are whole at a time.
    """
    size = BYTES[precision]
    share = world_size if zero.stage >= 3 else 1
    weights = shape.num_parameters * size // share
    if zero.stage >= 3 and world_size > 1:
        weights += 2 * shape.num_layer_parameters * size
    gradients = num_lora_parameters * size // (world_size if zero.stage >= 2 else 1)
    optimizer = num_lora_parameters * 12 // (world_size if zero.stage >= 1 else 1)
    host = (optimizer if zero.offload_optimizer else 0) + (weights if zero.offload_parameters else 0)
    return RankMemory(
        weights=2 * shape.num_layer_parameters * size if zero.offload_parameters else weights,
        adapter=num_lora_parameters * size,
        gradients=gradients,
        optimizer=0 if zero.offload_optimizer else optimizer,
        activations=activation_bytes(shape, row_tokens, size, recompute),
        host=host,
    )


def activation_bytes(shape: ModelShape, row_tokens: int, size: int, recompute: bool) -> int:
    """What the backward pass needs of a row.

    A layer keeps its two normalized inputs with their float32 originals, queries, keys, values, the attention's
    output, and four MLP activations. With recomputation every layer keeps its input only, and one layer at a time the
    rest.
    """
    attention = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    layer = row_tokens * (
        size * (4 * shape.hidden_size + attention + 4 * shape.intermediate_size) + 8 * shape.hidden_size
    )
    if recompute:
        return shape.num_layers * row_tokens * shape.hidden_size * size + 2 * layer
    return shape.num_layers * layer


def recommend(choices: dict[str, RankMemory], device_bytes: int) -> str:
    """The first choice that fits with the framework's share, in the given order; empty where none does."""
    fitting = (name for name, memory in choices.items() if memory.device + FRAMEWORK_BYTES <= device_bytes)
    return next(fitting, "")
