"""Forecasts against what the stages then do, and for models that no machine here could hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shards.world import make_builder, make_sample, make_split, write_split
from trsr_dist.errors import ConfigError
from trsr_dist.forecast.stages import TrainingSettings, forecast_training
from trsr_dist.forecast.workload import split_work
from trsr_dist.planning.cost import Cluster, generation_cost
from trsr_dist.planning.hardware import hardware, recognize
from trsr_dist.planning.shape import ModelShape
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.plan import PackingSettings, TrainPlan

LLAMA_70B = ModelShape(8192, 80, 64, 8, 128, 28672, 32000)
SETTINGS = TrainingSettings(2, 0, 16, 8192, 8, ("q_proj", "v_proj"), "bfloat16", True, False, False)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("measured", [False, True])
def test_work_is_that_of_the_planned_rows(tmp_path: Path, measured: bool) -> None:
    shards, builder = make_split(tmp_path / "train", (150, 150)), make_builder()
    settings = PackingSettings(row_tokens=2000, rows_per_step=4, negatives_per_positive=2, seed=0)
    if measured:
        measure_lengths(shards, builder)
    work = split_work(tmp_path / "train", builder, 2000, 2, 0)
    assert work.is_measured == measured
    plan = TrainPlan(measure_lengths(shards, builder), settings)
    facts = plan.facts(0)
    assert work.shared.tokens == pytest.approx(facts.num_tokens, rel=0.03)
    assert work.num_rows == pytest.approx(facts.num_rows, abs=1)
    assert work.num_users == 300
    assert work.shared.answers == 900


def test_separate_tokens_are_those_of_the_rows(tmp_path: Path) -> None:
    builder = make_builder()
    shards = write_split(tmp_path / "test", [make_sample(i) for i in range(40)], [40], "test")
    work = split_work(tmp_path / "test", builder, 4000, None, 0)
    users = [builder.build(shards.read(index)) for index in range(40)]
    expected = sum(len(user.prefix) * len(user.suffixes) + sum(map(len, user.suffixes)) for user in users)
    assert work.separate.tokens == expected


def cluster(num_nodes: int) -> Cluster:
    return Cluster(hardware("h100"), num_nodes, 8, 0.4, price_per_hour=2.0)


def test_a_model_of_70_billion_needs_its_weights_divided(tmp_path: Path) -> None:
    make_split(tmp_path / "train")
    work = split_work(tmp_path / "train", make_builder(), 2000, 1, 0)
    found = forecast_training(LLAMA_70B, work, SETTINGS, cluster(2))
    assert found.recommended == "zero3"
    assert found.memory["zero2"].weights == LLAMA_70B.num_parameters * 2
    assert found.memory["zero3"].weights < LLAMA_70B.num_parameters * 2 / 8
    assert found.sent["zero3"] > 100 * found.sent["zero2"]
    assert found.cost.money == pytest.approx(2.0 * found.cost.device_hours)


def test_more_devices_than_rows_bring_nothing(tmp_path: Path) -> None:
    make_split(tmp_path / "train")
    work = split_work(tmp_path / "train", make_builder(), 2000, 1, 0)
    times = [forecast_training(LLAMA_70B, work, SETTINGS, cluster(nodes), "zero2").cost.seconds for nodes in (1, 2, 4)]
    assert times[0] > 1.5 * times[1]
    assert times[2] >= times[1]


def test_devices_are_known_by_what_the_driver_says() -> None:
    assert recognize("NVIDIA H100 80GB HBM3").name == "h100"
    assert recognize("NVIDIA A100-SXM4-80GB").name == "a100-80gb"
    assert recognize("NVIDIA H200").name == "h200"
    assert recognize("Tesla K80") is None


def test_a_dry_run_reads_sizes_only_and_writes_nothing(tmp_path: Path) -> None:
    """A 70B config without weights; the shards have no measured lengths."""
    from tests.tokenizers import byte_level

    run, model = tmp_path / "run", tmp_path / "model"
    write_split(run / "shards" / "train", [make_sample(i) for i in range(30)], [30])
    byte_level().save_pretrained(model)
    sizes = {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 32000,
    }
    (model / "config.json").write_text(json.dumps(sizes))
    before = sorted(path for path in tmp_path.rglob("*"))
    command = [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml", f"run.dir={run}"]
    command += [f"model.name_or_path={model}", "--dry-run", "--nodes", "2", "--hardware", "a100-80gb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "68.98G parameters" in done.stdout
    assert "ds_configs/zero3.json is the first that fits" in done.stdout
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("nodes", "utilization"), [(0, 0.4), (1, 0.0), (1, 40.0)])
def test_a_cluster_that_cannot_be_is_refused(nodes: int, utilization: float) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Cluster(hardware("h100"), nodes, 8, utilization)


def test_many_texts_in_flight_are_limited_by_products() -> None:
    one = Cluster(hardware("h100"), 1, 1, 0.4)
    seconds = [generation_cost(one, 0, 10**9, 15 * 10**9, flight).seconds for flight in (8, 16, 1024, 4096)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[2] == seconds[3] == pytest.approx(10**9 * 15e9 / (one.hardware.flops_per_second * 0.4))
