"""Bytes that one rank sends in a training step, by ZeRO stage."""

from __future__ import annotations

from trsr_dist.planning.shape import ModelShape
from trsr_dist.planning.weights import BYTES


def bytes_sent_per_step(
    shape: ModelShape,
    num_lora_parameters: int,
    world_size: int,
    stage: int,
    rows_per_rank: int = 1,
    precision: str = "bfloat16",
) -> int:
    """Ring collectives: an all-reduce sends ``2 (w-1)/w`` of its operand, an all-gather or reduce-scatter half of that.

    Only the adapter has gradients. Stage 3 gathers the weights twice a row: for the forward and for the backward pass.
    """
    size, ring = BYTES[precision], (world_size - 1) / world_size
    sent = 2 * num_lora_parameters * size * ring
    if stage >= 3:
        sent += 2 * rows_per_rank * shape.num_parameters * size * ring
    return round(sent)
