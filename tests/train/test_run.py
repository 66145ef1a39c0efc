"""Whole trainings of one and two ranks: every loss, bad values, bad input, what is shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.merge.models import stretch
from tests.shards.world import make_sample, write_split
from tests.spawn import run_ranks
from tests.tokenizers import byte_level
from tests.train.world import link_run, losses_of, make_run, write_config
from trsr_dist.config import load_config
from trsr_dist.errors import TrsrError
from trsr_dist.metric_log import read_metrics
from trsr_dist.train.checkpoints import CheckpointFolder

STEPS = {"max_steps": 8}
POISON = "ÿ"
NAMES = (
    "loss",
    "auc",
    "yes_rate",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "users_per_second",
    "flops_per_second",
    "row_fill",
    "sharing_gain",
    "data_wait_share",
    "memory_gb",
    "eta_seconds",
    "epoch",
)


def train_all(rank: int, world_size: int, runs: list[Path]) -> list[str]:
    """Train every run in one process group; returns the errors that users would see."""
    from trsr_dist.train.job import train

    errors = []
    for run in runs:
        try:
            assert train(load_config(run / "config.yaml")) == 0
            errors.append("")
        except TrsrError as error:
            errors.append(str(error))
    return errors


def derive(folder: Path, source: Path, name: str, /, **changes: dict[str, Any]) -> Path:
    run = link_run(folder / name, source)
    changes["train"] = STEPS | changes.get("train", {})
    write_config(run, **changes)
    return run


@pytest.fixture(scope="module")
def by_loss(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """A run for each loss, and one in bfloat16, on one and on two ranks."""
    folder = tmp_path_factory.mktemp("losses")
    settings = {name: {"loss": name} for name in ("answer", "full_text", "pairwise", "listwise")}
    settings["bfloat16"] = {"precision": "bfloat16"}
    runs = {
        (name, world_size): derive(folder, source, f"{name}-{world_size}", train=train)
        for world_size in (1, 2)
        for name, train in settings.items()
    }
    for world_size in (1, 2):
        run_ranks(train_all, world_size, [run for (_, size), run in runs.items() if size == world_size])
    return runs


@pytest.mark.parametrize("loss", ["answer", "full_text", "pairwise", "listwise"])
def test_no_loss_depends_on_the_ranks(by_loss: dict, loss: str) -> None:
    one, two = (losses_of(by_loss[loss, world_size]) for world_size in (1, 2))
    assert len(one) == STEPS["max_steps"]
    assert one == pytest.approx(two, abs=1e-5)
    assert max(one.values()) - min(one.values()) > 0.01


@pytest.mark.parametrize("loss", ["answer", "full_text"])
def test_the_loss_falls(by_loss: dict, loss: str) -> None:
    losses = losses_of(by_loss[loss, 1])
    assert losses[8] < losses[1]


def test_bfloat16_stays_near_float32(by_loss: dict) -> None:
    exact = losses_of(by_loss["answer", 1])
    for world_size in (1, 2):
        assert losses_of(by_loss["bfloat16", world_size]) == pytest.approx(exact, rel=1e-2)


def test_what_a_run_shows(by_loss: dict) -> None:
    rows = [row for row in read_metrics(by_loss["answer", 2]) if "train/loss" in row]
    assert {row["stage"] for row in rows} == {"train"}
    for name in NAMES:
        assert f"train/{name}" in rows[-1]
    assert rows[-1]["train/sharing_gain"] > 1.5
    assert 0 < rows[-1]["train/row_fill"] <= 1
    assert 0 <= rows[-1]["train/auc"] <= 1


def test_tensorboard_and_its_hyperparameters(source: Path, tmp_path: Path) -> None:
    changes = {"run": {"tensorboard": True}, "train": {"evaluate_every_steps": 4, "save_every_steps": 4}}
    run = derive(tmp_path, source, "run", **changes)
    run_ranks(train_all, 1, [run])
    events = EventAccumulator(str(run / "tensorboard" / "train"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("valid/ndcg@10")] == [4, 8]
    assert (run / "checkpoints" / "best").is_file()


def test_a_finished_run_is_left_alone_and_force_starts_again(by_loss: dict) -> None:
    run = by_loss["answer", 1]
    before, config = (run / "metrics.jsonl").read_bytes(), run / "config" / "train.yaml"
    text = config.read_text()
    config.unlink()
    run_ranks(train_all, 1, [run])
    assert (run / "metrics.jsonl").read_bytes() == before and config.read_text() == text


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base gives NaN for one user's text."""
    run = make_run(tmp_path_factory.mktemp("poisoned"))
    samples = [make_sample(i) for i in range(60)]
    samples[17] = replace(samples[17], user="the-bad-user", summary=f"likes {POISON}")
    for path in (run / "shards" / "train").iterdir():
        path.unlink()
    write_split(run / "shards" / "train", samples, [60])
    for path in (run / "shards" / "valid").iterdir():
        path.unlink()
    validated = [make_sample(1000 + i) for i in range(6)]
    validated[2] = replace(validated[2], summary=f"likes {POISON}")
    write_split(run / "shards" / "valid", validated, [6], "valid")
    tokens = byte_level(chat=True)(POISON)["input_ids"]
    for path in (run / "base").glob("*.safetensors"):
        tensors = load_file(path)
        if "model.embed_tokens.weight" in tensors:
            tensors["model.embed_tokens.weight"][tokens] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
    return run


@pytest.fixture(scope="module")
def outcomes(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    stages = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}
    runs = []
    for name, stage in stages.items():
        run = derive(folder, poisoned, name)
        (run / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        lenient = {"max_bad_steps": 3, "max_steps": 6, "evaluate_every_steps": 6}
        write_config(run, train=lenient | {"deepspeed_config": str(run / "ds.json")})
        runs.append(run)
    strict = derive(folder, poisoned, "strict", train={"max_bad_steps": 0, "max_steps": 6})
    errors = run_ranks(train_all, 2, [*runs, strict])
    return {"runs": dict(zip(stages, runs, strict=True)), "errors": errors}


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_the_step_is_skipped_on_all_ranks_and_counted(outcomes: dict, stage: str) -> None:
    checkpoint = CheckpointFolder(outcomes["runs"][stage] / "checkpoints", 3).newest()
    assert checkpoint.state.step == 6
    assert checkpoint.state.skipped_steps >= 1
    assert checkpoint.state.adam_step == 6 - checkpoint.state.skipped_steps
    losses = losses_of(outcomes["runs"][stage])
    assert len(losses) == 6 - checkpoint.state.skipped_steps, "a step without a loss shows none"
    assert sum(row.get("train/skipped_steps", 0) for row in read_metrics(outcomes["runs"][stage])) == 6 - len(losses)
    text = (outcomes["runs"][stage] / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text, "neither is JSON"


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_a_validation_user_without_a_finite_score_is_left_out(outcomes: dict, stage: str) -> None:
    rows = [row for row in read_metrics(outcomes["runs"][stage]) if "valid/auc" in row]
    assert [row["step"] for row in rows] == [6]
    assert 0 < rows[0]["valid/auc"] < 1


def test_the_limit_stops_the_run_and_names_the_user(outcomes: dict) -> None:
    for errors in outcomes["errors"]:
        assert errors[:4] == ["", "", "", ""]
        assert "the-bad-user" in errors[4]
        assert "train.max_bad_steps allows 0" in errors[4]


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"train": {"rows_per_step": 1}}, "2 ranks share train.rows_per_step=1"),
    "target": ({"lora": {"target_modules": ["q_proj", "query"]}}, "'query' is not in this model.*q_proj"),
    "short row": ({"prompt": {"max_tokens": 32}, "train": {"row_tokens": 64}}, "instruction and answer cue alone"),
    "units": ({"train": {"loss": "pairwise", "row_tokens": 310}}, "compares a user's candidates"),
    "zero file": ({"train": {"deepspeed_config": "ds_configs/zero9.json"}}, "no such file"),
    "metric": ({"train": {"evaluate_every_steps": 5, "best_metric": "recall@7"}}, "best_metric='recall@7'"),
    "base": ({"model": {"name_or_path": "/no/such/model"}}, "no such model folder"),
    "no base": ({"model": {"name_or_path": ""}}, "model.name_or_path is empty"),
    "answers": ({"prompt": {"answers": ["certainly", "never"]}}, "not two different single"),
    "attention": ({"model": {"attention": "torch"}}, "needs a GPU"),
    "embedding": ({"lora": {"target_modules": ["q_proj", "embed_tokens"]}}, "'embed_tokens' is not in this model"),
}


def test_bad_input_is_named_before_training(source: Path, tmp_path: Path) -> None:
    """All in one process group: an error on all ranks leaves the group usable."""
    divided = {"model": {"name_or_path": str(stretch(source / "base", tmp_path / "stretched"))}}
    divided["train"] = {"deepspeed_config": "ds_configs/zero3.json"}
    cases = BAD_INPUT | {"divided": (divided, "ZeRO stage 3 on 2 ranks needs shared prefixes")}
    runs = [derive(tmp_path, source, name.replace(" ", "-"), **changes) for name, (changes, _) in cases.items()]
    errors = run_ranks(train_all, 2, runs)
    for found in errors:
        for (name, (_, expected)), error in zip(cases.items(), found, strict=True):
            assert_matches(expected, error, name)


def test_missing_shards_and_weights_are_named(source: Path, tmp_path: Path) -> None:
    bare = derive(tmp_path, source, "bare")
    (bare / "shards").unlink()
    hollow = derive(tmp_path, source, "hollow")
    (hollow / "base").unlink()
    (hollow / "base").mkdir()
    for path in (source / "base").glob("*.json"):
        (hollow / "base" / path.name).write_bytes(path.read_bytes())
    errors = run_ranks(train_all, 1, [bare, hollow])[0]
    assert_matches("run the stage that writes this folder first", errors[0], "shards")
    assert_matches(r"\.safetensors: missing; the model's weights are incomplete", errors[1], "weights")


def assert_matches(expected: str, error: str, name: str) -> None:
    assert re.search(expected, error), f"{name}: {error!r}"
