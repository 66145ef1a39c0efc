"""Steps, time, memory and traffic of each stage. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from trsr_dist.forecast.workload import SplitWork
from trsr_dist.planning.communication import bytes_sent_per_step
from trsr_dist.planning.cost import Cluster, Cost, scoring_cost, training_cost
from trsr_dist.planning.flops import forward_flops, last_layer_savings, training_flops
from trsr_dist.planning.memory import KeptActivations, RankMemory, ZeroSetting, rank_memory, recommend
from trsr_dist.planning.shape import ModelShape

STAGES = {
    "zero1": ZeroSetting(1),
    "zero2": ZeroSetting(2),
    "zero3": ZeroSetting(3),
    "zero3_offload": ZeroSetting(3, offload_optimizer=True, offload_parameters=True),
}
"""In the order of preference: less communication first."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What the cost of a training depends on, beside model and data."""

    num_epochs: float
    max_steps: int
    """0: by epochs."""
    rows_per_step: int
    row_tokens: int
    lora_r: int
    target_modules: tuple[str, ...] | str
    precision: str
    recompute: bool
    full_head: bool
    """The loss needs logits of all tokens."""
    dropout: bool
    """On the inputs of the LoRA layers."""


@dataclass(frozen=True, slots=True)
class TrainingForecast:
    """A training on a cluster."""

    num_lora_parameters: int
    num_steps: int
    flops_per_epoch: float
    """Recomputation included."""
    memory: dict[str, RankMemory]
    """By file of ds_configs/."""
    recommended: str
    """The first that fits the device; empty where none does."""
    sent: dict[str, int]
    """Bytes that a rank sends in a step, by file of ds_configs/."""
    cost: Cost


def forecast_training(
    shape: ModelShape, work: SplitWork, settings: TrainingSettings, cluster: Cluster, chosen: str = ""
) -> TrainingForecast:
    """Reckon with ``chosen``, a file of ds_configs/ without its ending; empty: with the recommended one.

    Raises:
        ModelError: a target of LoRA is not in the model.
    """
    lora = shape.num_lora_parameters(settings.lora_r, settings.target_modules)
    epoch_steps = -(-work.num_rows // settings.rows_per_step)
    num_steps = settings.max_steps or max(1, round(settings.num_epochs * epoch_steps))
    answer_pairs = None if settings.full_head else work.separate.tokens
    flops = training_flops(shape, work.shared, lora, settings.full_head, settings.recompute, answer_pairs)
    size = cluster.world_size
    memory = {name: _memory(shape, lora, settings, size, zero) for name, zero in STAGES.items()}
    rows_per_rank = -(-settings.rows_per_step // size)
    sent = {
        name: bytes_sent_per_step(shape, lora, size, zero.stage, rows_per_rank, settings.precision)
        for name, zero in STAGES.items()
    }
    recommended = recommend(memory, cluster.hardware.memory_bytes)
    traffic = sent.get(chosen or recommended, sent["zero2"])
    cost = training_cost(cluster, flops * num_steps / epoch_steps, num_steps, settings.rows_per_step, traffic)
    return TrainingForecast(lora, num_steps, flops, memory, recommended, sent, cost)


def forecast_scoring(shape: ModelShape, work: SplitWork, num_passes: int, cluster: Cluster) -> tuple[float, Cost]:
    """FLOPs and cost of ranking a split's users ``num_passes`` times (control, base and the like)."""
    saved = last_layer_savings(shape, work.shared, work.separate.tokens)
    flops = (forward_flops(shape, work.shared) - saved) * num_passes
    return flops, scoring_cost(cluster, flops)


def _memory(shape: ModelShape, lora: int, settings: TrainingSettings, size: int, zero: ZeroSetting) -> RankMemory:
    return rank_memory(
        shape,
        lora,
        settings.row_tokens,
        size,
        zero,
        settings.precision,
        KeptActivations(settings.recompute, settings.target_modules, not settings.full_head, settings.dropout),
    )
