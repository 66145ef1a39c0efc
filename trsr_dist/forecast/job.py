"""The forecast of a run, in words or as JSON. Writes nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from trsr_dist.config import Config, dump_config
from trsr_dist.environment import array_task, detect_ranks
from trsr_dist.forecast import text
from trsr_dist.forecast.build import PlannedStage, plan_stages
from trsr_dist.log import show
from trsr_dist.planning.cost import Cluster, Cost
from trsr_dist.planning.hardware import Hardware, hardware
from trsr_dist.planning.scaling import ScaledStage, ScalePoint, sweep

HERE = "here"
"""The name of the hardware that is measured."""


@dataclass(frozen=True, slots=True)
class Request:
    """For which cluster to plan."""

    hardware: str = "h100"
    num_nodes: int = 1
    devices_per_node: int = 8
    utilization: float | None = None
    """None: what is usual on that hardware."""
    price_per_hour: float = 0.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> Request:
        """From the options of ``cluster_options``."""
        return cls(args.hardware, args.nodes, args.devices_per_node, args.mfu, args.price)

    @property
    def cluster(self) -> Cluster:
        """
        Raises:
            ConfigError: the hardware is unknown.
        """
        device = self._device
        utilization = device.utilization if self.utilization is None else self.utilization
        return Cluster(device, self.num_nodes, self.devices_per_node, utilization, self.price_per_hour)

    @property
    def _device(self) -> Hardware:
        if self.hardware != HERE:
            return hardware(self.hardware)
        from trsr_dist.forecast.here import this_machine

        return this_machine(self.devices_per_node)


def dry_run(config: Config, request: Request, stage: str) -> int:
    """Print config and forecast of one stage, from the first process of all."""
    if detect_ranks().is_main and array_task()[0] == 0:
        cluster = request.cluster
        planned = plan_stages(config, [stage], cluster.hardware.precision)
        show(dump_config(config) + "# plan\n" + in_words(planned, cluster))
    return 0


def in_words(stages: Sequence[PlannedStage], cluster: Cluster) -> str:
    """Each stage, then how all scale.

    Raises:
        ConfigError: a stage would refuse to start on so many devices.
    """
    lines = text.cluster_lines(cluster)
    for stage in stages:
        stage.check(cluster)
        lines += stage.words(stage.on(cluster), cluster)
    return "\n".join([*lines, *text.scaling_lines(_points(stages, cluster), cluster)])


def in_json(stages: Sequence[PlannedStage], cluster: Cluster) -> str:
    """The same in numbers: seconds, bytes and counts.

    Raises:
        ConfigError: a stage would refuse to start on so many devices.
    """
    for stage in stages:
        stage.check(cluster)
    found = {stage.name: asdict(stage.on(cluster)) for stage in stages}
    points = [asdict(point) for point in _points(stages, cluster)]
    return json.dumps({"cluster": asdict(cluster), **found, "scaling": points}, indent=2)


def _points(stages: Sequence[PlannedStage], cluster: Cluster) -> list[ScalePoint]:
    """Stages in which a model runs."""
    costly = [stage for stage in stages if stage.on(cluster).cost is not None]
    scaled = {stage.name: ScaledStage(_cost_of(stage), stage.most_devices) for stage in costly}
    return sweep(cluster, scaled) if scaled else []


def _cost_of(stage: PlannedStage) -> Callable[[Cluster], Cost]:
    return lambda cluster: stage.on(cluster).cost
