"""A training that starts from an adapter: its weights, not its step, and only one that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.merge.models import make_adapter
from tests.spawn import run_ranks
from tests.train.world import link_run, make_run, start
from trsr_dist.files import read_json, sha256_of
from trsr_dist.train import prepare
from trsr_dist.train.checkpoints import WEIGHTS, CheckpointFolder

STAGES = (1, 3)


def train_on(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """A training, those that start from its adapter without moving it, and one from an adapter of PEFT's own."""
    first = {"init_adapter": str(folder / "first"), "learning_rate": 1e-30}
    found = {"first": start(folder / "first")}
    for stage in STAGES:
        zero = {"deepspeed_config": str(folder / f"zero{stage}.json")}
        found[str(stage)] = start(folder / f"stage{stage}", train=first | zero)
    foreign = first | {"init_adapter": str(folder / "foreign"), "max_steps": 1}
    found["foreign"] = start(folder / "other", train=foreign)
    found["resumed"] = start(folder / "other", train=foreign | {"max_steps": 2})
    found["scale"] = start(folder / "new", train=first, lora={"alpha": 80})
    found["targets"] = start(folder / "new", train=first, lora={"target_modules": ["q_proj"]})
    found["nothing"] = start(folder / "new", train={"init_adapter": "/no/such"})
    read_initial = prepare.read_initial
    if rank:
        prepare.read_initial = lambda *inputs: replace(read_initial(*inputs), digest="0123")
    found["moved on"] = start(folder / "new", train=first)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    source = make_run(folder / "first", num_users=40)
    for name in (*(f"stage{stage}" for stage in STAGES), "other", "new"):
        link_run(folder / name, source)
    for stage in STAGES:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    make_adapter(source / "base", folder / "foreign")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return run_ranks(train_on, 2, folder)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_it_starts_from_the_adapters_weights(found: dict, folder: Path, stage: int) -> None:
    assert (found["first"], found[str(stage)]) == ("0", "0")
    first, other = (CheckpointFolder(folder / name / "checkpoints", 3).newest() for name in ("first", f"stage{stage}"))
    for name, tensor in first.tensors.items():
        assert not name.startswith("weight/") or tensor.equal(other.tensors[name]), name
    assert other.state.step == other.state.adam_step == 2
    origin = {"folder": str(first.folder / "adapter"), "sha256": sha256_of(first.folder / WEIGHTS)}
    assert other.provenance["init_adapter"] == origin


def test_an_adapter_of_peft_serves_too_and_stays_on_record(found: dict, folder: Path) -> None:
    assert (found["foreign"], found["resumed"]) == ("0", "0")
    recorded = read_json(folder / "other" / "checkpoints" / "step-000002" / "provenance.json")["init_adapter"]
    assert recorded["folder"] == str(folder / "foreign")


def test_one_that_does_not_fit_is_named(found: dict) -> None:
    assert "lora_alpha=8.0, lora.alpha=80.0; set the latter so" in found["scale"]
    assert "go on with the lora.* settings of the adapter" in found["targets"]
    assert "train.init_adapter=/no/such: no adapter_config.json" in found["nothing"]


def test_all_ranks_start_from_the_same(found: dict) -> None:
    assert "the adapter to start from: rank 1 on" in found["moved on"]
    assert "finds SHA-256 0123" in found["moved on"] and "name a step-* folder" in found["moved on"]
