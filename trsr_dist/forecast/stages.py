"""Steps, time, memory and traffic of training and evaluation. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from trsr_dist.evaluate.passes import split_parts
from trsr_dist.forecast.workload import SplitWork
from trsr_dist.planning.communication import bytes_sent_per_step
from trsr_dist.planning.cost import Cluster, Cost, scoring_cost, training_cost
from trsr_dist.planning.flops import forward_flops, last_layer_savings, training_flops
from trsr_dist.planning.memory import (
    KeptActivations,
    RankMemory,
    ZeroSetting,
    divided_weights,
    forward_bytes,
    rank_memory,
    recommend,
)
from trsr_dist.planning.shape import ModelShape
from trsr_dist.planning.weights import BYTES, weight_bytes

STAGES = {
    "zero1": ZeroSetting(1),
    "zero2": ZeroSetting(2),
    "zero3": ZeroSetting(3),
    "zero3_offload": ZeroSetting(3, offload_optimizer=True, offload_parameters=True),
}
"""In the order of preference: less communication first."""
DIVIDED = 3
"""The first stage that divides the weights, which a quantized base cannot be."""


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
    quantization: str = "none"
    """Of the base."""
    shares_prefix: bool = True
    """False: every prompt runs as a sequence of its own."""

    @property
    def answers_only(self) -> bool:
        """The last layer runs at the answers alone."""
        return self.shares_prefix and not self.full_head


@dataclass(frozen=True, slots=True)
class TrainingForecast:
    """A training on a cluster."""

    work: SplitWork
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
    flops = epoch_flops(shape, work, settings, lora)
    size = cluster.world_size
    stages = {name: zero for name, zero in STAGES.items() if settings.quantization == "none" or zero.stage < DIVIDED}
    memory = {name: _memory(shape, lora, work, settings, size, zero) for name, zero in stages.items()}
    rows_per_rank = -(-settings.rows_per_step // size)
    sent = {
        name: bytes_sent_per_step(shape, lora, size, zero.stage, rows_per_rank, settings.precision)
        for name, zero in stages.items()
    }
    recommended = recommend(memory, cluster.hardware.memory_bytes - cluster.hardware.process_bytes)
    traffic = sent.get(chosen or recommended, sent["zero2"])
    cost = training_cost(cluster, flops * num_steps / epoch_steps, num_steps, settings.rows_per_step, traffic)
    return TrainingForecast(work, lora, num_steps, flops, memory, recommended, sent, cost)


def epoch_flops(shape: ModelShape, work: SplitWork, settings: TrainingSettings, num_lora_parameters: int) -> int:
    """Operations of one pass over the train users, recomputation included."""
    done = work.shared if settings.shares_prefix else work.separate
    answer_pairs = work.separate.tokens if settings.answers_only else None
    return training_flops(shape, done, num_lora_parameters, settings.full_head, settings.recompute, answer_pairs)


@dataclass(frozen=True, slots=True)
class ScoringForecast:
    """An evaluation on a cluster."""

    work: SplitWork
    passes: tuple[str, ...]
    """With a language model."""
    flops: float
    num_parts: int
    """Of users, each scored by one device; of all passes."""
    weight_bytes: int
    """Of a device."""
    activation_bytes: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class ScoringSettings:
    """What the cost of an evaluation depends on, beside model and data."""

    passes: tuple[str, ...]
    row_tokens: int
    precision: str
    divided: bool = False
    """The weights lie divided over the ranks (ZeRO-3)."""
    shares_prefix: bool = True


def forecast_scoring(
    shape: ModelShape, work: SplitWork, settings: ScoringSettings, cluster: Cluster
) -> ScoringForecast:
    """Ranking a split's users in every pass (model, control, base and the like)."""
    flops = forward_flops(shape, work.shared) - last_layer_savings(shape, work.shared, work.separate.tokens)
    if not settings.shares_prefix:
        flops = forward_flops(shape, work.separate)
    num_passes = len(settings.passes)
    num_parts = len(split_parts(work.num_users)) * num_passes
    weights = weight_bytes(shape, settings.precision)
    if settings.divided:
        weights = divided_weights(shape, settings.precision, cluster.world_size)
    activations = forward_bytes(shape, settings.row_tokens, BYTES[settings.precision])
    cost = scoring_cost(cluster, flops * num_passes, num_parts)
    return ScoringForecast(work, settings.passes, flops * num_passes, num_parts, weights, activations, cost)


def _memory(
    shape: ModelShape, lora: int, work: SplitWork, settings: TrainingSettings, size: int, zero: ZeroSetting
) -> RankMemory:
    copies = 1.0 if settings.shares_prefix else work.separate.tokens / work.shared.tokens
    return rank_memory(
        shape,
        lora,
        round(settings.row_tokens * copies),
        size,
        zero,
        settings.precision,
        KeptActivations(settings.recompute, settings.target_modules, settings.answers_only, settings.dropout),
        settings.quantization,
    )
