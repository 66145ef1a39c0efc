"""Time and money on a cluster, and where more nodes stop paying."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trsr_dist.planning.cost import Cluster, Generation, generation_cost, scoring_cost, training_cost
from trsr_dist.planning.hardware import hardware
from trsr_dist.planning.scaling import ScaledStage, pays_up_to, sweep

WEIGHTS = 15 * 10**9
TOKENS = 10**9


def cluster(num_nodes: int, devices_per_node: int = 8) -> Cluster:
    return Cluster(hardware("h100"), num_nodes, devices_per_node, 0.5, price_per_hour=2.0)


def generation(num_in_flight: int, context_bytes: float = 0.0, num_units: int = 1) -> Generation:
    return Generation(0.0, TOKENS, float(WEIGHTS), WEIGHTS, context_bytes, num_in_flight, num_units)


def test_training_stops_at_the_rows_of_a_step() -> None:
    seconds = [training_cost(cluster(nodes), 1e20, 100, 16, bytes_per_step=0).seconds for nodes in (1, 2, 4)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[1] == pytest.approx(seconds[2])
    assert training_cost(cluster(2), 1e20, 100, 16, 0).efficiency == pytest.approx(1.0)
    assert training_cost(cluster(4), 1e20, 100, 16, 0).efficiency == pytest.approx(0.5)


def test_links_are_paid_beside_the_products() -> None:
    free, paid = (training_cost(cluster(2), 1e20, 100, 64, sent) for sent in (0, 10**10))
    assert paid.seconds - free.seconds == pytest.approx(100 * 10**10 / 50e9)
    assert paid.efficiency == pytest.approx(free.seconds / paid.seconds)
    assert paid.money == pytest.approx(2.0 * paid.seconds * 16 / 3600)


def test_scoring_stops_at_the_parts() -> None:
    seconds = [scoring_cost(cluster(1, devices), 1e18, 12).seconds for devices in (1, 5, 12, 100)]
    assert seconds == pytest.approx([seconds[0], seconds[0] * 3 / 12, seconds[0] / 12, seconds[0] / 12])


def test_many_texts_in_flight_are_limited_by_products() -> None:
    one = cluster(1, 1)
    seconds = [generation_cost(one, generation(flight)).seconds for flight in (8, 16, 1024, 4096)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[0] == pytest.approx(TOKENS * WEIGHTS / 8 / one.hardware.memory_bytes_per_second)
    assert seconds[2] == seconds[3] == pytest.approx(TOKENS * WEIGHTS / one.flops_per_second)


def test_a_text_reads_its_own_keys_and_values() -> None:
    one = cluster(1, 1)
    without, long = (generation_cost(one, generation(8, context)).seconds for context in (0.0, WEIGHTS / 8))
    assert long == pytest.approx(2 * without)


def test_a_step_is_launched_once_for_all_texts_in_flight() -> None:
    one = cluster(1, 1)
    launched = [generation_cost(one, replace(generation(flight), step_seconds=0.1)).seconds for flight in (8, 16)]
    assert launched == pytest.approx([TOKENS * 0.1 / 8, TOKENS * 0.1 / 16])


def test_the_sweep_goes_on_until_nothing_pays() -> None:
    stages = {
        "train": ScaledStage(lambda on: training_cost(on, 1e20, 100, 32, 0), most_devices=32),
        "evaluate": ScaledStage(lambda on: scoring_cost(on, 1e18, 64)),
    }
    points = sweep(cluster(3), stages)
    assert [point.num_nodes for point in points] == [1, 2, 3, 4, 8, 16]
    assert (pays_up_to(points, "train"), pays_up_to(points, "evaluate")) == (4, 8)
    assert points[2].num_devices == 24
    whole = points[2].whole
    assert whole.money == pytest.approx(2.0 * whole.device_hours)
    assert whole.seconds == pytest.approx(sum(cost.seconds for cost in points[2].costs.values()))
    assert points[4].costs["train"] is None and points[4].whole is None, "64 devices, 32 rows"
    far = sweep(cluster(64), stages)
    assert [point.num_nodes for point in far][-1] == 128
    assert pays_up_to(far, "train") == 4


def test_slow_links_end_the_sweep_early() -> None:
    points = sweep(cluster(1), {"train": ScaledStage(lambda on: training_cost(on, 1e18, 100, 4096, 10**11))})
    assert pays_up_to(points, "train") == 1
    assert [point.num_nodes for point in points] == [1, 2]
