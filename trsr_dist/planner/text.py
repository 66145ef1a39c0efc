"""A plan in words or as JSON. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from trsr_dist.planner.cost import (
    GENERATION_FORMULA,
    PAYING_SPEEDUP,
    RATES,
    SCORING_FORMULA,
    TRAINING_FORMULA,
    Cluster,
    Cost,
    ScaledStage,
    ScalePoint,
    best_restarts,
    pays_up_to,
    sweep,
)
from trsr_dist.planner.hardware import GB
from trsr_dist.planner.memory import KEPT_BY_CPU
from trsr_dist.planner.shape import ModelShape
from trsr_dist.planner.stages import (
    ZERO_SETTINGS,
    PlannedStage,
    ScoringForecast,
    SummaryForecast,
    TrainingForecast,
    TrainingSettings,
)
from trsr_dist.planner.work import SummarySettings

INDENT = " " * 11
SOURCES = {
    "measured": "",
    "sampled": ", from a sample of the shards' prompts",
    "histories": ", from the histories, with every summary at its longest",
}
FORMULAS = {"summarize": GENERATION_FORMULA, "train": TRAINING_FORMULA, "evaluate": SCORING_FORMULA}


def in_words(stages: Sequence[PlannedStage], cluster: Cluster) -> str:
    """What is assumed, each stage, then how all scale.

    Raises:
        ConfigError: a stage would refuse to start on this number of devices.
    """
    device = cluster.hardware
    slow = device.computing_in("float32").flops_per_second
    other = f" ({slow / 1e12:,.4g} in float32)" if slow != device.flops_per_second else ""
    lines = [
        f"cluster    {cluster.num_nodes} x {cluster.devices_per_node} {device.name}: "
        f"{device.flops_per_second / 1e12:,.4g} TFLOP/s{other} and {device.memory_bytes / GB:.0f} GB each, "
        f"utilization {cluster.utilization:.0%} (--mfu)"
    ]
    for stage in stages:
        stage.check(cluster)
        lines += stage.words(stage.on(cluster), cluster)
        if stage.name == "train":
            lines += failure_lines(cluster)
    return "\n".join([*lines, *scaling_lines(_points(stages, cluster), cluster)])


def in_json(stages: Sequence[PlannedStage], cluster: Cluster) -> str:
    """The same in numbers: seconds, bytes and counts.

    Raises:
        ConfigError: a stage would refuse to start on this number of devices.
    """
    for stage in stages:
        stage.check(cluster)
    found = {stage.name: asdict(stage.on(cluster)) for stage in stages}
    if "train" in found:
        found["failures"] = {
            num_devices: {name: asdict(plan) | {"overhead": plan.overhead} for name, plan in plans.items()}
            for num_devices, plans in best_restarts(cluster.save_seconds, cluster.restart_seconds).items()
        }
    points = [asdict(point) for point in _points(stages, cluster)]
    return json.dumps({"cluster": asdict(cluster), **found, "scaling": points}, indent=2)


def _points(stages: Sequence[PlannedStage], cluster: Cluster) -> list[ScalePoint]:
    """Of the stages in which a model runs."""

    def scaled(stage: PlannedStage) -> ScaledStage:
        return ScaledStage(lambda cluster: stage.on(cluster).cost, stage.most_devices)

    costly = {stage.name: scaled(stage) for stage in stages if stage.on(cluster).cost is not None}
    return sweep(cluster, costly) if costly else []


def summary_lines(found: SummaryForecast, settings: SummarySettings, cluster: Cluster) -> list[str]:
    """The summarization: prompts, time and memory."""
    work = found.work
    lines = [
        f"summarize  {work.num_users:,} users in {work.num_units:,} units, {work.num_prompts:,} prompts, about "
        f"{big(work.prompt_tokens)} tokens in and at most {big(work.new_tokens)} out (estimated by the texts' length)"
    ]
    if found.cost is None:
        return [*lines, f"{INDENT}no model, minutes"]
    held = found.weight_bytes + found.key_value_bytes
    texts = f"keys and values of {settings.num_in_flight} texts of at most {settings.most_tokens:,} tokens"
    return [
        *lines,
        f"{INDENT}{cost_text(found.cost)}",
        f"{INDENT}GB a device: {found.weight_bytes / GB:.1f} weights, {found.key_value_bytes / GB:.1f} {texts}"
        f"{fit_text(held, cluster, 'lower summarize.max_in_flight, or take several devices for a server')}",
    ]


def training_lines(
    shape: ModelShape, settings: TrainingSettings, found: TrainingForecast, cluster: Cluster, chosen: str
) -> list[str]:
    """The training: data, steps, time, memory and traffic by stage."""
    work = found.work
    shared, separate = work.shared, work.separate
    computed = (shared if settings.shares_prefix else separate).tokens
    lines = [
        f"model      {big(shape.num_parameters)} parameters, {big(found.num_lora_parameters)} trainable "
        f"(LoRA r {settings.lora_r})",
        f"train      {work.num_users:,} users, {shared.answers / work.num_users:.1f} answers each: "
        f"{shared.tokens / work.num_users:,.0f} tokens a user in rows, {separate.tokens / work.num_users:,.0f} as "
        f"separate sequences ({separate.tokens / shared.tokens:.2f}x){SOURCES[work.source]}",
    ]
    if not settings.shares_prefix:
        lines.append(f"{INDENT}this model's prompts run as separate sequences (docs/training.md)")
    lines += [
        f"{INDENT}an epoch: {work.num_rows:,} rows of {settings.step.row_tokens:,}, {big(computed)} tokens, "
        f"{big(found.flops_per_epoch)} FLOPs" + (" with recomputation" if settings.step.recompute is True else ""),
        f"{INDENT}{found.num_steps:,} steps of {settings.rows_per_step} rows in all",
        f"{INDENT}{cost_text(found.cost)}",
    ]
    return [*lines, *memory_lines(found, cluster, chosen)]


def memory_lines(found: TrainingForecast, cluster: Cluster, chosen: str) -> list[str]:
    """Memory of a rank and its traffic, by stage."""
    lines = [f"{INDENT}GB a rank:      weights  adapter  gradients  optimizer  activations    sum   sent a step"]
    for name in ZERO_SETTINGS:
        if name not in found.memory:
            continue
        m = found.memory[name]
        cells = [m.weights, m.adapter, m.gradients, m.optimizer, m.activations]
        row = "".join(f"{value / GB:{width}.2f}" for value, width in zip(cells, (9, 9, 11, 11, 13), strict=True))
        mark = "  <- train.deepspeed_config" if name == chosen else ""
        host = f" (+{m.host / GB:.1f} on the host)" if m.host else ""
        sent = found.sent[name] / GB
        lines.append(f"{INDENT}{name:<14}{row}{m.device / GB:7.1f}{sent:10.2f} GB{host}{mark}")
    advice = (
        f"ds_configs/{found.recommended}.json is the first that fits"
        if found.recommended
        else "none fits: lower train.row_tokens, or take more or larger devices"
    )
    device = cluster.hardware
    lines.append(f"{INDENT}with {device.process_bytes / GB:.1f} GB for {_libraries(cluster)} and buffers, {advice}")
    if device.is_cpu:
        lines.append(
            f"{INDENT}a rank keeps freed memory, up to {KEPT_BY_CPU} times the sum, while the machine has enough"
        )
    return lines


def failure_lines(cluster: Cluster) -> list[str]:
    """Time lost to failures on ever more devices, with the best interval of checkpoints."""
    lines = [
        f"failures   {cluster.save_seconds:g} s a checkpoint (--save-seconds), {cluster.restart_seconds:g} s from a "
        "failure to the next step (--restart-seconds)",
        f"{INDENT}{'devices':>9}" + "".join(f"{name + ': lost':>34}{'save every':>15}" for name in RATES),
    ]
    for num_devices, plans in best_restarts(cluster.save_seconds, cluster.restart_seconds).items():
        cells = "".join(f"{plan.overhead:>34.2%}{duration(plan.interval):>15}" for plan in plans.values())
        lines.append(f"{INDENT}{num_devices:>9,}{cells}")
    return lines


def scoring_lines(split: str, found: ScoringForecast, cluster: Cluster) -> list[str]:
    """The evaluation: passes, time and memory."""
    work, passes = found.work, found.passes
    held = found.weight_bytes + found.activation_bytes
    return [
        f"evaluate   {work.num_users:,} {split} users, {work.shared.answers / work.num_users:.1f} candidates each, "
        f"{len(passes)} passes ({', '.join(passes)}) in {found.num_parts:,} parts: {big(found.flops)} FLOPs"
        f"{SOURCES[work.source]}",
        f"{INDENT}{cost_text(found.cost)}",
        f"{INDENT}GB a device: {found.weight_bytes / GB:.1f} weights, {found.activation_bytes / GB:.1f} activations of "
        f"a row{fit_text(held, cluster, 'lower evaluate.row_tokens, or set evaluate.deepspeed_config')}",
    ]


def fit_text(held: int, cluster: Cluster, remedy: str) -> str:
    """A sum against the device's memory."""
    memory = cluster.hardware.memory_bytes
    needed = held + cluster.hardware.process_bytes
    verdict = "" if needed <= memory else f": does not fit; {remedy}"
    share = f"{cluster.hardware.process_bytes / GB:.1f} for {_libraries(cluster)}"
    return f", with {share} {needed / GB:.1f} of {memory / GB:.0f}{verdict}"


def _libraries(cluster: Cluster) -> str:
    return "Python" if cluster.hardware.is_cpu else "CUDA"


def scaling_lines(points: Sequence[ScalePoint], cluster: Cluster) -> list[str]:
    """All stages on ever more nodes, and where more stop paying."""
    if not points:
        return []
    stages = list(points[0].costs)
    header = "".join(f"{stage:>14}{'busy':>6}" for stage in stages)
    price = f"{'price':>13}" if cluster.price_per_hour else ""
    lines = [f"scaling{'nodes':>10}{'devices':>9}{header}{'device hours':>15}{price}"]
    lines += [scale_line(point, cluster) for point in points]
    ends = ", ".join(f"{stage} {pays_up_to(points, stage):,}" for stage in stages)
    lines.append(
        f"{INDENT}twice the nodes pay while that is {PAYING_SPEEDUP:g} times as fast or more; they stop paying at: "
        f"{ends} nodes"
    )
    return lines + [f"{INDENT}{stage}: seconds = {FORMULAS[stage]}" for stage in stages]


def scale_line(point: ScalePoint, cluster: Cluster) -> str:
    """One number of nodes; a dash where a stage refuses the number of devices."""
    cells = "".join(
        f"{duration(cost.seconds):>14}{cost.efficiency:6.0%}" if cost else f"{'-':>14}{'':6}"
        for cost in point.costs.values()
    )
    hours = f"{point.whole.device_hours:>15,.2f}" if point.whole else f"{'-':>15}"
    price = f"{point.whole.money:>13,.2f}" if point.whole and cluster.price_per_hour else ""
    mark = "  <- asked" if point.num_nodes == cluster.num_nodes else ""
    return f"{point.num_nodes:>17,}{point.num_devices:>9,}{cells}{hours}{price}{mark}"


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
