"""The cost of stages on ever more nodes, and up to where more of them pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trsr_dist.planning.cost import Cluster, Cost

PAYING_SPEEDUP = 1.5
"""Twice the nodes pay while they make a stage at least so many times as fast: a third of the time is saved, for a third
more money."""
LAST_DOUBLING = 20
"""A million nodes: no sweep goes on beyond."""


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """All stages on so many nodes."""

    num_nodes: int
    num_devices: int
    costs: dict[str, Cost]
    """By stage."""

    @property
    def device_hours(self) -> float:
        return sum(cost.device_hours for cost in self.costs.values())

    @property
    def money(self) -> float:
        return sum(cost.money for cost in self.costs.values())


def sweep(cluster: Cluster, stages: Mapping[str, Callable[[Cluster], Cost]]) -> list[ScalePoint]:
    """One node, two, four and so on, with the cluster's own number, until twice the nodes pay for no stage.

    Args:
        cluster: its number of nodes is in the sweep.
        stages: the cost of each on a cluster.
    """
    points: list[ScalePoint] = []
    for doubling in range(LAST_DOUBLING):
        points.append(_point(cluster.of_nodes(2**doubling), stages))
        if len(points) > 1 and points[-1].num_nodes > cluster.num_nodes and not _pays(*points[-2:]):
            break
    if cluster.num_nodes not in [point.num_nodes for point in points]:
        points.append(_point(cluster, stages))
    return sorted(points, key=lambda point: point.num_nodes)


def pays_up_to(points: Sequence[ScalePoint], stage: str) -> int:
    """Nodes from which on twice as many do not pay for the stage."""
    seconds = {point.num_nodes: point.costs[stage].seconds for point in points}
    nodes = 1
    while 2 * nodes in seconds and seconds[nodes] >= PAYING_SPEEDUP * seconds[2 * nodes] > 0:
        nodes *= 2
    return nodes


def _pays(fewer: ScalePoint, more: ScalePoint) -> bool:
    pairs = ((fewer.costs[stage].seconds, more.costs[stage].seconds) for stage in more.costs)
    return any(before >= PAYING_SPEEDUP * after > 0 for before, after in pairs)


def _point(cluster: Cluster, stages: Mapping[str, Callable[[Cluster], Cost]]) -> ScalePoint:
    costs = {name: cost_on(cluster) for name, cost_on in stages.items()}
    return ScalePoint(cluster.num_nodes, cluster.world_size, costs)
