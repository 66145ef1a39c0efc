"""From counted work to hours and money, on a cluster and on ever more of its nodes; and what failures add to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from trsr_dist.errors import ConfigError
from trsr_dist.planner.hardware import Hardware

DAY = 86400.0
RATES = {"2,000 days a device": 2000 * DAY, "7.9 hours at 1,024 devices": 7.9 * 3600 * 1024}
"""Seconds between failures of one device: a good cluster, and Meta's in 2024 (Kokolis et al., arXiv 2410.21680)."""
SAVE_SECONDS, RESTART_SECONDS = 1.0, 37.0
"""The goal for a checkpoint's pause, and from a failure to the next step on the tests' laboratory, whose nodes share a
machine and whose model loads at once: docs/reliability.md."""
DEVICES = (8, 64, 512, 1024, 4096, 16384)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a run is planned for."""

    hardware: Hardware
    num_nodes: int
    devices_per_node: int
    utilization: float
    """Model FLOP/s utilization that is assumed, 0 to 1."""
    price_per_hour: float = 0.0
    """Of one device."""
    save_seconds: float = SAVE_SECONDS
    """Pause of a training for a checkpoint."""
    restart_seconds: float = RESTART_SECONDS
    """From a failure to the next step."""

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"--mfu {self.utilization:g}: expected a share above 0 and up to 1, such as 0.4")
        if min(self.num_nodes, self.devices_per_node) < 1:
            raise ConfigError(f"{self.num_nodes} nodes of {self.devices_per_node} devices: expected 1 or more of each")
        if not 0 <= self.price_per_hour < math.inf:
            raise ConfigError(f"--price {self.price_per_hour:g}: expected 0 or more for an hour of one device")
        pauses = (self.save_seconds, self.restart_seconds)
        if not all(0 < pause <= DAY for pause in pauses):
            raise ConfigError(
                "--save-seconds {:g}, --restart-seconds {:g}: expected more than 0, and a day at most".format(*pauses)
            )

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def flops_per_second(self) -> float:
        """Of one device, as far as it is used."""
        return self.hardware.flops_per_second * self.utilization

    def computing_in(self, precision: str) -> Cluster:
        """The cluster with its devices' rate in a precision."""
        return replace(self, hardware=self.hardware.computing_in(precision))


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of a stage on a cluster."""

    seconds: float
    device_hours: float
    money: float
    efficiency: float
    """Share of the time in which devices compute: the rest waits for work (too little for the devices) and for the
    links."""


PAYING_SPEEDUP = 1.5
"""Twice the nodes pay while they make a stage at least this many times as fast: a third of the time is saved,
for a third more money."""
LAST_DOUBLING = 20
"""A million nodes: no sweep goes on beyond."""
TRAINING_FORMULA = "steps * (ceil(rows / devices) / rows * FLOPs / rate + bytes / link)"
SCORING_FORMULA = "ceil(parts / devices) / parts * FLOPs / rate"
GENERATION_FORMULA = (
    "ceil(units / devices) / units * (prompts' FLOPs / rate + "
    "new tokens * max((weights / in flight + keys and values) / bandwidth, FLOPs of a token / rate, "
    "host's time of a step / in flight))"
)


def training_cost(cluster: Cluster, flops: float, num_steps: int, rows_per_step: int, bytes_per_step: float) -> Cost:
    """``TRAINING_FORMULA``.

    Scaling stops paying where the ranks reach the rows of a step, or where the links take as long as the products.
    Collectives are counted as not overlapped, so the result is an upper bound of their part.
    """
    compute, device = flops / cluster.flops_per_second, cluster.hardware
    # The slower of the links that a ring over all devices crosses.
    link = device.network_bytes_per_second if cluster.num_nodes > 1 else device.node_bytes_per_second
    links = num_steps * bytes_per_step / link
    return _cost(cluster, _slowest(rows_per_step, cluster.world_size) * compute + links, compute)


def scoring_cost(cluster: Cluster, flops: float, num_parts: int) -> Cost:
    """``SCORING_FORMULA``: forward passes without collectives, of parts that are scored whole by one device."""
    compute = flops / cluster.flops_per_second
    return _cost(cluster, _slowest(num_parts, cluster.world_size) * compute, compute)


@dataclass(frozen=True, slots=True)
class Generation:
    """What is generated, on each device by a copy of the model."""

    prefill_flops: float
    num_new_tokens: int
    flops_per_token: float
    """Of a new token."""
    weight_bytes: int
    context_bytes: float
    """Keys and values that a new token reads, on average."""
    num_in_flight: int
    """Texts that are decoded at once."""
    num_units: int
    """That are worked on by one device each."""
    step_seconds: float = 0.0
    """Time that the host takes to launch a decoding step, of however many texts."""


def generation_cost(cluster: Cluster, work: Generation) -> Cost:
    """``GENERATION_FORMULA``.

    Prompts are limited by products. Decoding is limited by reading: the weights once for a token of each text in
    flight, each text's own keys and values; with many texts in flight, by products; and by the host, which launches a
    step's kernels one by one.
    """
    reading = (work.weight_bytes / work.num_in_flight + work.context_bytes) / cluster.hardware.memory_bytes_per_second
    launching = work.step_seconds / work.num_in_flight
    decode = work.num_new_tokens * max(reading, work.flops_per_token / cluster.flops_per_second, launching)
    seconds = work.prefill_flops / cluster.flops_per_second + decode
    return _cost(cluster, _slowest(work.num_units, cluster.world_size) * seconds, seconds)


def _slowest(num_pieces: int, num_devices: int) -> float:
    """Share of all pieces that the device with most of them has."""
    return -(-num_pieces // num_devices) / num_pieces if num_pieces else 0.0


def _cost(cluster: Cluster, seconds: float, one_device_seconds: float) -> Cost:
    device_hours = seconds * cluster.world_size / 3600
    efficiency = one_device_seconds / cluster.world_size / seconds if seconds else 1.0
    return Cost(seconds, device_hours, device_hours * cluster.price_per_hour, efficiency)


@dataclass(frozen=True, slots=True)
class ScaledStage:
    """A stage on any cluster."""

    cost_on: Callable[[Cluster], Cost]
    most_devices: int | None = None
    """More are refused; None: any number works."""


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """All stages on a number of nodes."""

    num_nodes: int
    num_devices: int
    costs: dict[str, Cost | None]
    """By stage; None: that many devices are refused."""

    @property
    def whole(self) -> Cost | None:
        """All stages, one after the other; None: one of them is refused."""
        costs = [cost for cost in self.costs.values() if cost is not None]
        if len(costs) < len(self.costs):
            return None
        seconds = sum(cost.seconds for cost in costs)
        busy = sum(cost.seconds * cost.efficiency for cost in costs)
        hours, money = sum(cost.device_hours for cost in costs), sum(cost.money for cost in costs)
        return Cost(seconds, hours, money, busy / seconds if seconds else 1.0)


def sweep(cluster: Cluster, stages: Mapping[str, ScaledStage]) -> list[ScalePoint]:
    """One node, two, four and so on, with the cluster's own number, until twice the nodes pay for no stage.

    Args:
        cluster: its number of nodes is in the sweep.
        stages: by name.
    """
    points: list[ScalePoint] = []
    for doubling in range(LAST_DOUBLING):
        points.append(_scale_point(replace(cluster, num_nodes=2**doubling), stages))
        if points[-1].num_nodes > cluster.num_nodes:
            fewer, more = points[-2:]
            if not any(_is_worth_it(fewer.costs[stage], more.costs[stage]) for stage in stages):
                break
    if cluster.num_nodes not in [point.num_nodes for point in points]:
        points.append(_scale_point(cluster, stages))
    return sorted(points, key=lambda point: point.num_nodes)


def pays_up_to(points: Sequence[ScalePoint], stage: str) -> int:
    """Nodes from which on twice as many do not pay for the stage."""
    costs = {point.num_nodes: point.costs[stage] for point in points}
    nodes = 1
    while 2 * nodes in costs and _is_worth_it(costs[nodes], costs[2 * nodes]):
        nodes *= 2
    return nodes


def _is_worth_it(fewer: Cost | None, more: Cost | None) -> bool:
    return fewer is not None and more is not None and fewer.seconds >= PAYING_SPEEDUP * more.seconds > 0


def _scale_point(cluster: Cluster, stages: Mapping[str, ScaledStage]) -> ScalePoint:
    costs: dict[str, Cost | None] = {}
    for name, stage in stages.items():
        is_refused = stage.most_devices is not None and cluster.world_size > stage.most_devices
        costs[name] = None if is_refused else stage.cost_on(cluster)
    return ScalePoint(cluster.num_nodes, cluster.world_size, costs)


@dataclass(frozen=True, slots=True)
class Restarts:
    """How a job saves and fails. All times in seconds."""

    save: float
    """The pause of a checkpoint."""
    interval: float
    """Work between checkpoints."""
    restart: float
    """From a failure to the next step: notice, queue, start, reading the checkpoint, the first window."""
    between_failures: float
    """Mean of the whole job: of one device, divided by the number of devices."""

    @property
    def overhead(self) -> float:
        """Expected time a second of work, less 1; failures come at random, in restarts too (Daly 2006)."""
        mean = self.between_failures
        segment = mean * math.exp(self.restart / mean) * math.expm1((self.interval + self.save) / mean)
        return segment / self.interval - 1


def best_interval(save: float, between_failures: float) -> float:
    """Seconds of work between checkpoints that cost least, to first order (Young 1974)."""
    return math.sqrt(2 * save * between_failures)


def best_restarts(save: float, restart: float) -> dict[int, dict[str, Restarts]]:
    """By number of devices and name of the rate, each with its best interval; times in seconds."""
    return {
        num_devices: {
            name: Restarts(save, best_interval(save, mean / num_devices), restart, mean / num_devices)
            for name, mean in RATES.items()
        }
        for num_devices in DEVICES
    }
