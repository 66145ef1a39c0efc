"""Time and money on a cluster, and where more nodes stop paying."""

from __future__ import annotations

import math
from dataclasses import replace
from math import ceil

import pytest

from trsr_dist.errors import ConfigError
from trsr_dist.planner.cost import (
    DAY,
    GENERATION_FORMULA,
    RATES,
    SCORING_FORMULA,
    TRAINING_FORMULA,
    Cluster,
    Cost,
    Generation,
    ScaledStage,
    ScalePoint,
    best_restarts,
    generation_cost,
    pays_up_to,
    scoring_cost,
    sweep,
    training_cost,
)
from trsr_dist.planner.hardware import Hardware, hardware


def cluster(num_nodes: int, devices_per_node: int = 8) -> Cluster:
    return Cluster(hardware("h100"), num_nodes, devices_per_node, 0.5, price_per_hour=2.0)


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


SIX = Cluster(Hardware("small", 1000.0, 100, 50.0, 20.0, 10.0), 2, 3, 0.5, 2.0)
"""Six devices of 500 used FLOP/s, with links of 10 bytes/s."""


def test_costs_by_hand() -> None:
    assert fields(training_cost(SIX, 1e6, 4, 9, 30)) == fields_of(2 / 9 * 2000 + 4 * 30 / 10, 2000)
    assert fields(training_cost(replace(SIX, num_nodes=1), 1e6, 4, 9, 30))[0] == pytest.approx(
        3 / 9 * 2000 + 4 * 30 / 20
    )
    assert fields(scoring_cost(SIX, 1e6, 13)) == fields_of(3 / 13 * 2000, 2000)
    assert scoring_cost(SIX, 1e6, 0) == Cost(0.0, 0.0, 0.0, 1.0)


def fields(cost: Cost) -> tuple[float, ...]:
    return cost.seconds, cost.device_hours, cost.money, cost.efficiency


def fields_of(seconds: float, one_device_seconds: float) -> object:
    """Of a cost on ``SIX``, where one device alone takes so long."""
    hours = seconds * 6 / 3600
    return pytest.approx((seconds, hours, hours * 2, one_device_seconds / 6 / seconds))


def test_generation_by_hand() -> None:
    work = Generation(1000.0, 100, 7.0, 400, 5.0, num_in_flight=4, num_units=7)
    assert work.step_seconds == 0
    for changed, decoding in (
        ({}, 100 * (400 / 4 + 5) / 50),
        ({"step_seconds": 40.0}, 1000),
        ({"flops_per_token": 5e3}, 1000),
    ):
        alone = 1000 / 500 + decoding
        assert fields(generation_cost(SIX, replace(work, **changed))) == fields_of(2 / 7 * alone, alone)


PHRASES = {
    "FLOPs of a token": "7.0",
    "prompts' FLOPs": "1000.0",
    "new tokens": "100",
    "in flight": "4",
    "keys and values": "5.0",
    "host's time of a step": "0.0",
}


def test_the_printed_formulas_are_what_is_computed() -> None:
    sizes = {"rows": 9, "parts": 9, "units": 7, "devices": 6, "steps": 4, "FLOPs": 1e6, "rate": 500.0, "ceil": ceil}
    sizes |= {"bytes": 30, "link": 10, "weights": 400, "bandwidth": 50.0}
    assert eval(TRAINING_FORMULA, sizes) == pytest.approx(training_cost(SIX, 4e6, 4, 9, 30).seconds)
    assert eval(SCORING_FORMULA, sizes) == pytest.approx(scoring_cost(SIX, 1e6, 9).seconds)
    formula = GENERATION_FORMULA
    for phrase, number in PHRASES.items():
        assert phrase in formula
        formula = formula.replace(phrase, number)
    work = Generation(1000.0, 100, 7.0, 400, 5.0, num_in_flight=4, num_units=7)
    assert eval(formula, sizes) == pytest.approx(generation_cost(SIX, work).seconds)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"utilization": 0.0}, "--mfu 0: expected a share above 0"),
        ({"utilization": 1.01}, "--mfu 1.01"),
        ({"num_nodes": 0}, "0 nodes of 3 devices"),
        ({"devices_per_node": 0}, "2 nodes of 0 devices"),
        ({"price_per_hour": -0.5}, "--price -0.5"),
        ({"price_per_hour": math.nan}, "--price nan"),
        ({"price_per_hour": math.inf}, "--price inf"),
        ({"save_seconds": 0.0}, "--save-seconds 0"),
        ({"save_seconds": math.nan}, "--save-seconds nan"),
        ({"restart_seconds": 1e9}, r"--restart-seconds 1e\+09: expected more than 0, and a day at most"),
    ],
)
def test_impossible_clusters_are_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SIX, **changed)
    edge = replace(SIX, utilization=1.0, num_nodes=1, devices_per_node=1, price_per_hour=0.0)
    assert (edge.world_size, edge.flops_per_second) == (1, 1000.0)
    assert Cluster(SIX.hardware, 1, 1, 0.5).price_per_hour == 0
    longest = best_restarts(DAY, DAY)
    assert all(math.isfinite(plan.overhead) for plans in longest.values() for plan in plans.values())


def of_seconds(by_nodes: dict[int, float]) -> ScaledStage:
    return ScaledStage(lambda on: Cost(by_nodes.get(on.num_nodes, 1.0), 2.0, 3.0, 0.5))


def test_twice_the_nodes_pay_from_a_third_less_time_on() -> None:
    points = sweep(replace(SIX, num_nodes=1), {"edge": of_seconds({1: 9.0, 2: 6.0, 4: 4.01})})
    assert pays_up_to(points, "edge") == 2
    assert [point.num_nodes for point in points] == [1, 2, 4]
    assert [point.num_devices for point in points] == [3, 6, 12]
    nothing = sweep(replace(SIX, num_nodes=1), {"none": of_seconds({1: 0.0, 2: 0.0})})
    assert pays_up_to(nothing, "none") == 1 and len(nothing) == 2


def test_the_sweep_goes_beyond_the_clusters_own_number_and_not_for_ever() -> None:
    flat = {"flat": of_seconds({})}
    assert [point.num_nodes for point in sweep(replace(SIX, num_nodes=1), flat)] == [1, 2]
    assert [point.num_nodes for point in sweep(replace(SIX, num_nodes=4), flat)] == [1, 2, 4, 8]
    assert [point.num_nodes for point in sweep(replace(SIX, num_nodes=5), flat)] == [1, 2, 4, 5, 8]
    endless = {"halves": of_seconds({2**power: 0.5**power for power in range(40)})}
    points = sweep(replace(SIX, num_nodes=1), endless)
    assert [point.num_nodes for point in points] == [2**power for power in range(20)]
    assert pays_up_to(points, "halves") == 2**19


def test_a_stage_is_refused_beyond_its_devices_only() -> None:
    stages = {"some": ScaledStage(lambda on: Cost(1.0, 2.0, 3.0, 0.5), most_devices=6), "any": of_seconds({})}
    points = sweep(replace(SIX, num_nodes=1), stages)
    assert [point.costs["some"] is None for point in points] == [False, False]
    later = sweep(replace(SIX, num_nodes=2), stages)
    assert [point.costs["some"] is None for point in later] == [False, False, True]
    assert later[2].whole is None and pays_up_to(later, "some") == 1


def test_all_stages_are_one_after_the_other() -> None:
    point = ScalePoint(2, 6, {"one": Cost(3.0, 5.0, 7.0, 0.5), "two": Cost(1.0, 2.0, 4.0, 0.9)})
    assert fields(point.whole) == pytest.approx((4.0, 7.0, 11.0, (1.5 + 0.9) / 4))
    assert ScalePoint(1, 1, {}).whole == Cost(0, 0, 0, 1.0)


@pytest.mark.parametrize(("save", "restart", "lost"), [(10, 300, 0.037), (1, 20, 0.009)])
def test_time_lost_to_failures_each_7_9_hours(save: float, restart: float, lost: float) -> None:
    """Expected restarts, half an interval of work done again, and a pause every interval."""
    plan = best_restarts(save, restart)[1024]["7.9 hours at 1,024 devices"]
    assert plan.between_failures == pytest.approx(7.9 * 3600)
    first_order = (restart + plan.interval / 2) / plan.between_failures + save / plan.interval
    assert plan.overhead == pytest.approx(first_order, rel=0.03)
    assert plan.overhead == pytest.approx(lost, rel=0.03)


def test_more_devices_lose_more_and_save_more_often() -> None:
    plans = best_restarts(1, 20)
    for name in RATES:
        found = [(plans[n][name].overhead, -plans[n][name].interval) for n in sorted(plans)]
        assert found == sorted(found) and len(found) == 6
    with pytest.raises(ConfigError, match="--save-seconds 0, --restart-seconds 37: expected more than 0"):
        replace(cluster(1), save_seconds=0.0)
