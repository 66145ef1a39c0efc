"""Forecasts in words. Pure."""

from __future__ import annotations

from trsr_dist.forecast.stages import STAGES, TrainingForecast, TrainingSettings
from trsr_dist.forecast.summaries import SummaryWork
from trsr_dist.forecast.workload import SplitWork
from trsr_dist.planning.cost import Cluster, Cost
from trsr_dist.planning.memory import FRAMEWORK_BYTES
from trsr_dist.planning.shape import ModelShape

GB = 1e9


def cluster_lines(cluster: Cluster) -> list[str]:
    """What is reckoned with."""
    device = cluster.hardware
    return [
        f"cluster    {cluster.num_nodes} x {cluster.devices_per_node} {device.name}: "
        f"{device.flops_per_second / 1e12:.0f} TFLOP/s and {device.memory_bytes / GB:.0f} GB each, "
        f"utilization {cluster.utilization:.0%} (--mfu)"
    ]


def summary_lines(work: SummaryWork, cost: Cost | None) -> list[str]:
    """The summarization; ``cost`` None: no model generates."""
    lines = [
        f"summarize  {work.num_users:,} users, {work.num_prompts:,} prompts, about {big(work.prompt_tokens)} tokens in "
        f"and at most {big(work.new_tokens)} out (reckoned by the texts' length)"
    ]
    return [*lines, "           extractive: no model, minutes" if cost is None else f"           {cost_text(cost)}"]


def training_lines(
    shape: ModelShape,
    work: SplitWork,
    settings: TrainingSettings,
    found: TrainingForecast,
    cluster: Cluster,
    chosen: str,
) -> list[str]:
    """The training: data, steps, time, memory and traffic by stage, and where scaling ends."""
    shared, separate = work.shared, work.separate
    lines = [
        f"model      {big(shape.num_parameters)} parameters, {big(found.num_lora_parameters)} trainable "
        f"(LoRA r {settings.lora_r})",
        f"train      {work.num_users:,} users, {shared.answers / work.num_users:.1f} answers each: "
        f"{shared.tokens / work.num_users:,.0f} tokens a user in rows, {separate.tokens / work.num_users:,.0f} as "
        f"separate sequences ({separate.tokens / shared.tokens:.2f}x)"
        + ("" if work.is_measured else ", from a sample of prompts"),
        f"           an epoch: {work.num_rows:,} rows of {settings.row_tokens:,}, {big(shared.tokens)} tokens, "
        f"{big(found.flops_per_epoch)} FLOPs" + (" with recomputation" if settings.recompute else ""),
        f"           {found.num_steps:,} steps of {settings.rows_per_step} rows in all",
        f"           {cost_text(found.cost)}",
    ]
    return [*lines, *memory_lines(found, cluster, chosen), *scaling_lines(settings, found, cluster)]


def memory_lines(found: TrainingForecast, cluster: Cluster, chosen: str) -> list[str]:
    """Memory of a rank and its traffic, by stage."""
    lines = ["           GB a rank:      weights  adapter  gradients  optimizer  activations    sum   sent a step"]
    for name in STAGES:
        m = found.memory[name]
        cells = [m.weights, m.adapter, m.gradients, m.optimizer, m.activations]
        row = "".join(f"{value / GB:{width}.2f}" for value, width in zip(cells, (9, 9, 11, 11, 13), strict=True))
        mark = "  <- train.deepspeed_config" if name == chosen else ""
        host = f" (+{m.host / GB:.1f} on the host)" if m.host else ""
        sent = found.sent[name] / GB
        lines.append(f"           {name:<14}{row}{m.device / GB:7.1f}{sent:10.2f} GB{host}{mark}")
    advice = (
        f"ds_configs/{found.recommended}.json is the first that fits"
        if found.recommended
        else "none fits: lower train.row_tokens, or take more or larger devices"
    )
    return [*lines, f"           with {FRAMEWORK_BYTES / GB:.1f} GB for CUDA and buffers, {advice}"]


def scaling_lines(settings: TrainingSettings, found: TrainingForecast, cluster: Cluster) -> list[str]:
    """Where more devices stop paying."""
    return [
        f"           scaling: devices compute {found.cost.efficiency:.0%} of the time; a step has "
        f"{settings.rows_per_step} rows, so more than {settings.rows_per_step} devices idle; "
        f"seconds = steps * (ceil(rows / devices) / rows * FLOPs / rate + bytes / link)"
    ]


def scoring_lines(split: str, work: SplitWork, passes: list[str], flops: float, cost: Cost) -> list[str]:
    """The evaluation."""
    return [
        f"evaluate   {work.num_users:,} {split} users, {work.shared.answers / work.num_users:.1f} candidates each, "
        f"{len(passes)} passes ({', '.join(passes)}): {big(flops)} FLOPs",
        f"           {cost_text(cost)}",
    ]


def cost_text(cost: Cost) -> str:
    """Time, device hours, money where a price is known."""
    money = f", {cost.money:,.2f} in all" if cost.money else ""
    return f"{duration(cost.seconds)}, {cost.device_hours:.2f} device hours{money}"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def big(number: float) -> str:
    """With a letter for thousands, millions and so on."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:.0f}"
