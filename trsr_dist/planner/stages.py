"""Steps, time, memory and traffic of summarization, training and evaluation, from what there is to do. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trsr_dist.errors import ConfigError
from trsr_dist.evaluate.passes import split_parts
from trsr_dist.planner.cost import Cluster, Cost, Generation, generation_cost, scoring_cost, training_cost
from trsr_dist.planner.flops import Workload, forward_flops, training_flops
from trsr_dist.planner.memory import (
    BYTES,
    RankMemory,
    StepSettings,
    ZeroSetting,
    bytes_sent_per_step,
    divided_weights,
    forward_bytes,
    key_value_bytes,
    rank_memory,
    recommend,
    weight_bytes,
)
from trsr_dist.planner.shape import ModelShape
from trsr_dist.planner.work import SplitWork, SummarySettings, SummaryWork

ZERO_SETTINGS = {
    "zero1": ZeroSetting(1),
    "zero2": ZeroSetting(2),
    "zero3": ZeroSetting(3),
    "zero3_offload": ZeroSetting(3, offload_optimizer=True, offload_parameters=True),
}
"""In the order of preference: less communication first."""
DIVIDED = 3
"""The first stage that divides the weights, which a quantized base cannot be."""
SUMMARY_PRECISION = "bfloat16"
"""Of ``summarize.precision=auto`` on GPUs, and of servers."""
LAYER_SECONDS = {"transformers": 1e-3}
"""By engine: host's time of a layer in a decoding step, as measured beside an H200 (docs/gpu_results.md). Servers
replay graphs of kernels, which costs the host next to nothing."""


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage whose cost can be told for any cluster."""

    name: str
    on: Callable[[Cluster], Any]
    """The forecast: a dataclass of numbers with a ``cost``, which is None where no model runs."""
    words: Callable[[Any, Cluster], list[str]]
    """The forecast in lines."""
    most_devices: int | None = None
    """The stage refuses more; None: it takes any number."""
    limit: str = ""
    """The setting that says so."""

    def check(self, cluster: Cluster) -> None:
        """
        Raises:
            ConfigError: the stage would refuse to start on this number of devices.
        """
        if self.most_devices is not None and cluster.world_size > self.most_devices:
            raise ConfigError(
                f"{self.name}: {cluster.world_size} devices ({cluster.num_nodes} x {cluster.devices_per_node}) would "
                f"share {self.limit}={self.most_devices}; raise it, or plan with fewer --nodes or --devices-per-node"
            )


@dataclass(frozen=True, slots=True)
class SummaryForecast:
    """A summarization on a cluster, with one copy of the model on every device."""

    work: SummaryWork
    weight_bytes: int = 0
    """Of a device; 0: no model generates."""
    key_value_bytes: int = 0
    """Of a device: of the longest prompts and answers, as many as are in flight."""
    cost: Cost | None = None
    """None: no model generates."""


def forecast_summaries(
    shape: ModelShape, work: SummaryWork, settings: SummarySettings, cluster: Cluster
) -> SummaryForecast:
    """Memory and cost."""
    precision = settings.precision
    if precision == "auto":
        precision = "float32" if cluster.hardware.is_cpu else SUMMARY_PRECISION
    weights = weight_bytes(shape, precision)
    most = key_value_bytes(shape, settings.num_in_flight * settings.most_tokens, precision)
    generated = generation(shape, work, settings.num_in_flight, settings.engine, precision)
    cost = generation_cost(cluster.computing_in(precision), generated)
    return SummaryForecast(work, weights, most, cost)


def generation(shape: ModelShape, work: SummaryWork, num_in_flight: int, engine: str, precision: str) -> Generation:
    """The work in operations and bytes. A new token reads its prompt and, on average, half of the answer.

    Args:
        shape: of the model.
        work: its prompts.
        num_in_flight: texts that are decoded at once.
        engine: of ``summarize.engine``; empty: the host's time counts for nothing.
        precision: of weights, keys and values.
    """
    prompts = Workload(work.prompt_tokens, work.pairs, work.num_prompts, work.num_users)
    context = (work.prompt_tokens + work.new_tokens / 2) / max(1, work.num_prompts)
    token = Workload(tokens=1, pairs=round(context))
    return Generation(
        prefill_flops=forward_flops(shape, prompts),
        num_new_tokens=work.new_tokens,
        flops_per_token=forward_flops(shape, token) + 2 * shape.hidden_size * shape.vocab_size,
        weight_bytes=weight_bytes(shape, precision),
        context_bytes=key_value_bytes(shape, round(context), precision),
        num_in_flight=num_in_flight,
        num_units=work.num_units,
        step_seconds=shape.num_layers * LAYER_SECONDS.get(engine, 0.0),
    )


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What the cost of a training depends on, beside model and data."""

    num_epochs: float
    max_steps: int
    """0: by epochs."""
    rows_per_step: int
    lora_r: int
    full_head: bool
    """The loss needs logits of all tokens."""
    shares_prefix: bool
    """False: every prompt runs as a separate sequence."""
    step: StepSettings


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
    shape: ModelShape, work: SplitWork, settings: TrainingSettings, cluster: Cluster, chosen: str
) -> TrainingForecast:
    """Plan with ``chosen``, one of ``ZERO_SETTINGS``; empty: with the recommended one.

    Raises:
        ModelError: a target of LoRA is not in the model.
    """
    step, cluster = settings.step, cluster.computing_in(settings.step.precision)
    lora = shape.num_lora_parameters(settings.lora_r, step.target_modules)
    epoch_steps = -(-work.num_rows // settings.rows_per_step)
    num_steps = settings.max_steps or max(1, round(settings.num_epochs * epoch_steps))
    done = work.shared if settings.shares_prefix else work.separate
    answer_pairs = work.separate.tokens if step.answers_only else None
    flops = training_flops(shape, done, lora, settings.full_head, step.recompute is True, answer_pairs)
    size = cluster.world_size
    stages = {name: zero for name, zero in ZERO_SETTINGS.items() if step.quantization == "none" or zero.stage < DIVIDED}
    copies = 1.0 if settings.shares_prefix else work.separate.tokens / work.shared.tokens
    step = replace(step, row_tokens=round(step.row_tokens * copies))
    memory = {name: rank_memory(shape, lora, step, zero, size) for name, zero in stages.items()}
    rows_per_rank = -(-settings.rows_per_step // size)
    sent = {
        name: bytes_sent_per_step(shape, lora, size, zero.stage, rows_per_rank, step.precision)
        for name, zero in stages.items()
    }
    device = cluster.hardware
    recommended = recommend(memory, device.memory_bytes - device.process_bytes)
    traffic = sent.get(chosen or recommended, sent["zero2"])
    cost = training_cost(cluster, flops * num_steps / epoch_steps, num_steps, settings.rows_per_step, traffic)
    return TrainingForecast(work, lora, num_steps, flops, memory, recommended, sent, cost)


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
    flops = forward_flops(shape, work.shared, answer_pairs=work.separate.tokens)
    if not settings.shares_prefix:
        flops = forward_flops(shape, work.separate)
    num_passes = len(settings.passes)
    num_parts = len(split_parts(work.num_users)) * num_passes
    weights = weight_bytes(shape, settings.precision)
    if settings.divided:
        weights = divided_weights(shape, settings.precision, cluster.world_size)
    activations = forward_bytes(shape, settings.row_tokens, BYTES[settings.precision])
    cost = scoring_cost(cluster.computing_in(settings.precision), flops * num_passes, num_parts)
    return ScoringForecast(work, settings.passes, flops * num_passes, num_parts, weights, activations, cost)
