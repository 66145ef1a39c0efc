"""From counted work to hours and money."""

from __future__ import annotations

from dataclasses import dataclass

from trsr_dist.errors import ConfigError
from trsr_dist.planning.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a run is planned for."""

    hardware: Hardware
    num_nodes: int
    devices_per_node: int
    utilization: float
    """Model FLOP/s utilization that is reckoned with, 0 to 1."""
    price_per_hour: float = 0.0
    """Of one device."""

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"--mfu {self.utilization:g}: expected a share above 0 and up to 1, such as 0.4")
        if min(self.num_nodes, self.devices_per_node) < 1:
            raise ConfigError(f"{self.num_nodes} nodes of {self.devices_per_node} devices: expected 1 or more of each")

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.devices_per_node

    @property
    def link_bytes_per_second(self) -> float:
        """The slower of the links that a ring over all devices crosses."""
        return self.hardware.network_bytes_per_second if self.num_nodes > 1 else self.hardware.node_bytes_per_second


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of a stage on a cluster."""

    seconds: float
    device_hours: float
    money: float
    efficiency: float
    """Share of the time in which devices compute: the rest waits for rows (too few for the ranks) and for the links."""


def training_cost(cluster: Cluster, flops: float, num_steps: int, rows_per_step: int, bytes_per_step: float) -> Cost:
    """``steps * (ceil(rows / w) / rows * step FLOPs / (peak * utilization) + bytes / link)``.

    Scaling stops paying where the ranks reach the rows of a step, or where the links take as long as the products.
    Collectives are reckoned as not overlapped, so the result is an upper bound of their part.
    """
    rate = cluster.hardware.flops_per_second * cluster.utilization
    rows_per_rank = -(-rows_per_step // cluster.world_size)
    compute = flops * rows_per_rank / rows_per_step / rate
    ideal = flops / cluster.world_size / rate
    return _cost(cluster, compute + num_steps * bytes_per_step / cluster.link_bytes_per_second, ideal)


def scoring_cost(cluster: Cluster, flops: float) -> Cost:
    """Forward passes without collectives."""
    seconds = flops / cluster.world_size / (cluster.hardware.flops_per_second * cluster.utilization)
    return _cost(cluster, seconds, seconds)


def generation_cost(
    cluster: Cluster, prefill_flops: float, num_new_tokens: int, weight_bytes: int, num_in_flight: int
) -> Cost:
    """Prompts are limited by products; decoding by reading the weights once a step of ``num_in_flight`` texts, or by
    the products of many texts: two operations for each weight of two bytes."""
    prefill = prefill_flops / (cluster.hardware.flops_per_second * cluster.utilization)
    reading = weight_bytes / num_in_flight / cluster.hardware.memory_bytes_per_second
    products = weight_bytes / (cluster.hardware.flops_per_second * cluster.utilization)
    decode = num_new_tokens * max(reading, products)
    seconds = (prefill + decode) / cluster.world_size
    return _cost(cluster, seconds, seconds)


def _cost(cluster: Cluster, seconds: float, ideal: float) -> Cost:
    device_hours = seconds * cluster.world_size / 3600
    return Cost(seconds, device_hours, device_hours * cluster.price_per_hour, ideal / seconds if seconds else 1.0)
