"""Validation in training: the numbers of the evaluation, the best checkpoint kept, an early end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.world import make_run, write_config
from tests.spawn import run_ranks
from tests.train.world import train_all
from trsr_dist.cli import EXIT_REQUEUE
from trsr_dist.config import load_config
from trsr_dist.errors import ModelError
from trsr_dist.evaluate.job import evaluate
from trsr_dist.files import read_json, write_json
from trsr_dist.metric_log import read_metrics
from trsr_dist.train.checkpoints import CheckpointFolder

EVERY, NUM_STEPS = 3, 12
NUM_USERS = 25
TRAIN = {
    "learning_rate": 2e-2,
    "max_steps": NUM_STEPS,
    "row_tokens": 1024,
    "rows_per_step": 4,
    "num_workers": 0,
    "save_every_steps": EVERY,
    "evaluate_every_steps": EVERY,
    "evaluate_users": NUM_USERS,
    "best_metric": "mrr@3",
    "keep_checkpoints": 9,
    "timeout_seconds": 120,
}
STAGES = (2, 3)


def prepare(run: Path, source: Path, stage: int, **train: Any) -> Path:
    run.mkdir(parents=True)
    for name in ("base", "histories", "shards"):
        (run / name).symlink_to(source / name)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    write_json(run / "ds.json", {"zero_optimization": zero})
    write_config(run, train=TRAIN | {"deepspeed_config": str(run / "ds.json")} | train)
    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def runs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Trainings of both stages on two ranks, and one that cannot get better."""
    folder = tmp_path_factory.mktemp("runs")
    made = {stage: prepare(folder / f"zero{stage}", source, stage) for stage in STAGES}
    made["stuck"] = prepare(folder / "stuck", source, 3, learning_rate=1e-30, early_stopping_patience=2)
    run_ranks(train_all, 2, list(made.values()))
    return made


def validations(run: Path) -> dict[int, dict[str, float]]:
    """Metrics of the validation users, by step."""
    rows = [row for row in read_metrics(run) if "valid/auc" in row]
    return {
        row["step"]: {k.removeprefix("valid/"): v for k, v in row.items() if k.startswith("valid/")} for row in rows
    }


@pytest.mark.parametrize("stage", STAGES)
def test_the_metrics_are_those_of_the_evaluation(runs: dict, stage: int, tmp_path: Path) -> None:
    run = runs[stage]
    found = validations(run)
    assert sorted(found) == list(range(EVERY, NUM_STEPS + 1, EVERY))
    assert len({values["auc"] for values in found.values()}) > 1, "the model must change, or equal numbers say nothing"
    chosen = {"split": "valid", "max_users": NUM_USERS, "baselines": [], "bootstrap_samples": 0}
    config = write_config(run, "evaluate.yaml", evaluate=chosen)
    for step in (EVERY, NUM_STEPS):
        evaluate(config, f"RUN/checkpoints/step-{step:06d}", output=str(tmp_path / str(step)))
        assert read_json(tmp_path / str(step) / "valid.json")["metrics"] == found[step]


def test_divided_weights_do_not_change_them(runs: dict) -> None:
    two, three = (validations(runs[stage]) for stage in STAGES)
    assert two == {step: pytest.approx(values, abs=0.05) for step, values in three.items()}
    assert two[EVERY] == pytest.approx(three[EVERY])


@pytest.mark.parametrize("stage", STAGES)
def test_best_names_the_checkpoint_with_the_best_metric(runs: dict, stage: int) -> None:
    values = {step: metrics["mrr@3"] for step, metrics in validations(runs[stage]).items()}
    best = max(values, key=lambda step: (values[step], -step))
    folder = runs[stage] / "checkpoints"
    assert (folder / "best").read_text().strip() == f"step-{best:06d}"
    assert read_json(folder / f"step-{best:06d}" / "provenance.json")["train"]["best_value"] == values[best]
    assert CheckpointFolder(folder, 9).newest().state.best_step == best


def test_without_progress_it_ends_early_and_stays_ended(runs: dict) -> None:
    """Three equal validations: the first is the best, the others use up the patience."""
    run = runs["stuck"]
    assert sorted(validations(run)) == [EVERY, 2 * EVERY, 3 * EVERY]
    assert (run / "checkpoints" / "best").read_text().strip() == f"step-{EVERY:06d}"
    run_ranks(train_all, 2, [run])
    assert sorted(validations(run)) == [EVERY, 2 * EVERY, 3 * EVERY]
    assert CheckpointFolder(run / "checkpoints", 9).newest().state.step == 3 * EVERY


def start_unluckily(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Trainings that are stopped before, within and right after a validation, each started until it ends."""
    from trsr_dist.train import validation
    from trsr_dist.train.job import train
    from trsr_dist.train.monitor import Monitor

    def start(run: Path) -> int:
        try:
            return train(load_config(run / "config.yaml"))
        except (KeyboardInterrupt, ModelError):
            return -9

    short, broken, unmarked, doubled = (folder / name for name in ("short", "broken", "unmarked", "doubled"))
    found: dict[str, Any] = {"short": [start(short) for _ in range(6)]}

    def show_and_die(monitor: Monitor, *shown: Any) -> None:
        evaluated(monitor, *shown)
        _interrupt()

    evaluated, Monitor.evaluated = Monitor.evaluated, show_and_die
    found["doubled"] = [start(doubled)]
    Monitor.evaluated = evaluated
    found["doubled"] += [start(doubled)]

    run, mark_best, values = validation.Validator.run, CheckpointFolder.mark_best, iter([0.5, 0.9, 0.6, 0.6])
    validation.Validator.run = _interrupt
    found["broken"] = [start(broken)]
    validation.Validator.run = run
    found["broken"] += [CheckpointFolder(broken / "checkpoints", 9).newest().state.step, start(broken)]

    validation.Validator.run = lambda *args: run(*args) | {"mrr@3": next(values)}
    CheckpointFolder.mark_best = lambda folder, step: mark_best(folder, step) if step == EVERY else _interrupt()
    found["unmarked"] = [start(unmarked)]
    CheckpointFolder.mark_best = mark_best
    found["unmarked"] += [start(unmarked)]
    return found


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unlucky(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unlucky")
    few = {"evaluate_users": 3}
    prepare(folder / "short", source, 2, **few, max_steps=4, evaluate_every_steps=2, walltime_seconds=0.1)
    prepare(folder / "broken", source, 2, **few, max_steps=EVERY, save_every_steps=100)
    prepare(folder / "doubled", source, 2, **few, max_steps=EVERY)
    prepare(folder / "unmarked", source, 2, **few, keep_checkpoints=2)
    return folder, run_ranks(start_unluckily, 1, folder)[0]


def test_a_validation_without_time_is_left_to_the_next_start(unlucky: tuple) -> None:
    folder, codes = unlucky
    assert codes["short"] == [EXIT_REQUEUE] * 4 + [0, 0], "each start makes one step; the fifth validates the last one"
    assert sorted(validations(folder / "short")) == [2, 4]


def test_a_kill_in_the_validation_costs_no_step(unlucky: tuple) -> None:
    folder, codes = unlucky
    assert codes["broken"] == [-9, EVERY, 0], "the step was saved before"
    assert sorted(validations(folder / "broken")) == [EVERY]


def test_a_validation_that_was_shown_and_not_saved_is_shown_once(unlucky: tuple) -> None:
    folder, codes = unlucky
    assert codes["doubled"] == [-9, 0]
    assert [row["step"] for row in read_metrics(folder / "doubled") if "valid/auc" in row] == [EVERY]


def test_a_kill_before_the_mark_loses_no_best_checkpoint(unlucky: tuple) -> None:
    folder, codes = unlucky
    assert codes["unmarked"] == [-9, 0]
    assert (folder / "unmarked" / "checkpoints" / "best").read_text().strip() == f"step-{2 * EVERY:06d}"
    assert (folder / "unmarked" / "checkpoints" / f"step-{2 * EVERY:06d}").is_dir()
