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
class ScaledStage:
    """A stage on any cluster."""

    cost_on: Callable[[Cluster], Cost]
    most_devices: int | None = None
    """More are refused; None: any number works."""


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """All stages on so many nodes."""

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
        points.append(_point(cluster.of_nodes(2**doubling), stages))
        if points[-1].num_nodes > cluster.num_nodes and not _pays(*points[-2:]):
            break
    if cluster.num_nodes not in [point.num_nodes for point in points]:
        points.append(_point(cluster, stages))
    return sorted(points, key=lambda point: point.num_nodes)


def pays_up_to(points: Sequence[ScalePoint], stage: str) -> int:
    """Nodes from which on twice as many do not pay for the stage."""
    costs = {point.num_nodes: point.costs[stage] for point in points}
    nodes = 1
    while 2 * nodes in costs and _is_worth_it(costs[nodes], costs[2 * nodes]):
        nodes *= 2
    return nodes


def _pays(fewer: ScalePoint, more: ScalePoint) -> bool:
    return any(_is_worth_it(fewer.costs[stage], cost) for stage, cost in more.costs.items())


def _is_worth_it(fewer: Cost | None, more: Cost | None) -> bool:
    return fewer is not None and more is not None and fewer.seconds >= PAYING_SPEEDUP * more.seconds > 0


def _point(cluster: Cluster, stages: Mapping[str, ScaledStage]) -> ScalePoint:
    costs = {name: _cost(stage, cluster) for name, stage in stages.items()}
    return ScalePoint(cluster.num_nodes, cluster.world_size, costs)


def _cost(stage: ScaledStage, cluster: Cluster) -> Cost | None:
    is_refused = stage.most_devices is not None and cluster.world_size > stage.most_devices
    return None if is_refused else stage.cost_on(cluster)
