"""Whole evaluations: equal to the last digit on any number of ranks and after kills, and guarded against mixtures."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.evaluate.world import numbers_of, parts_of, run_command, scores_of, start, write_config
from tests.merge.models import seal
from tests.spawn import run_ranks
from trsr_dist.config import load_config
from trsr_dist.errors import ConfigError, DataError, ModelError, RunError
from trsr_dist.evaluate.job import evaluate
from trsr_dist.files import read_json, write_json
from trsr_dist.model.artifacts import model_identity
from trsr_dist.run import manifest_hash

NUM_PARTS = 3
PASSES = ("model", "control", "base")


def evaluate_all(rank: int, world_size: int, jobs: Sequence[tuple[Path, str, Path]]) -> None:
    """Evaluations by config, model and output, one after the other in one process group."""
    for config, model, output in jobs:
        assert evaluate(load_config(config), model, output=str(output)) == 0


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of several ranks: each with the whole model, and with the weights divided."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    write_json(folder / "zero3.json", {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    write_config(run, "divided.yaml", evaluate={"deepspeed_config": str(folder / "zero3.json")})
    jobs = [
        (run / "config.yaml", "RUN/merged", folder / "whole"),
        (run / "divided.yaml", "RUN/merged", folder / "divided"),
        (run / "divided.yaml", "RUN/checkpoints/step-000007", folder / "adapter"),
    ]
    run_ranks(evaluate_all, request.param, jobs if request.param == 2 else jobs[:2])
    return folder


def assert_equal(output: Path, expected: Path) -> None:
    """Every score and every number of the results."""
    for name in PASSES:
        assert len(parts_of(output, name)) == NUM_PARTS
        assert parts_of(output, name) == parts_of(expected, name), name
    assert (output / "test.json").read_bytes() == (expected / "test.json").read_bytes()


@pytest.mark.parametrize("kind", ["whole", "divided"])
def test_any_number_of_ranks_gives_the_same_digits(together: Path, alone: Path, kind: str) -> None:
    assert_equal(together / kind, alone)
    values = list(scores_of(alone).values())
    assert len(set(values)) > len(values) // 2, "equal scores would say nothing"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_compiled_layers_score_alike_and_are_not_mixed_with_others(run: Path, alone: Path, tmp_path: Path) -> None:
    plain, compiled = load_config(run / "config.yaml"), write_config(run, "compiled.yaml", model={"compile": True})
    assert evaluate(compiled, "RUN/merged", output=str(tmp_path)) == 0
    assert scores_of(tmp_path) == pytest.approx(scores_of(alone), abs=1e-4)
    with pytest.raises(RunError, match="compile"):
        evaluate(plain, "RUN/merged", output=str(tmp_path))


@pytest.mark.parametrize("together", [2], indirect=True)
def test_an_adapter_over_divided_weights_scores_as_the_merged_model(together: Path, alone: Path) -> None:
    expected, found = scores_of(alone), scores_of(together / "adapter")
    assert found == pytest.approx(expected, abs=1e-4)
    assert parts_of(together / "adapter", "base") == parts_of(alone, "base")


@pytest.mark.long
def test_a_killed_evaluation_goes_on_without_scoring_again(run: Path, alone: Path, tmp_path: Path) -> None:
    process = start(run, tmp_path)
    deadline = time.monotonic() + 120
    while not parts_of(tmp_path):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "test.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "test").rglob("part-*.jsonl")}
    assert 0 < len(before) < NUM_PARTS * len(PASSES), "it must be killed in the middle"
    code, text = run_command(run, tmp_path, ranks=2)
    assert code == 0, text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_equal(tmp_path, alone)


def test_tasks_of_an_array_share_the_parts_and_the_last_one_reduces(run: Path, alone: Path, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
    code, text = run_command(run, tmp_path, SLURM_ARRAY_TASK_ID="1", **array)
    assert code == 0, text
    assert "left to other tasks: parts of" in text
    assert 0 < len(parts_of(tmp_path)) < NUM_PARTS
    code, text = run_command(run, tmp_path, SLURM_ARRAY_TASK_ID="0", **array)
    assert code == 0, text
    assert_equal(tmp_path, alone)


@pytest.fixture
def done(alone: Path, tmp_path: Path) -> Path:
    """A copy of a finished evaluation."""
    return shutil.copytree(alone, tmp_path / "done")


def test_a_finished_evaluation_is_left_alone(run: Path, done: Path, capsys: pytest.CaptureFixture) -> None:
    config = done / "config" / "evaluate.yaml"
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file() and path != config}
    text = config.read_text()
    config.unlink()
    for _ in range(2):
        evaluate(load_config(run / "config.yaml"), "RUN/merged", output=str(done))
        assert "already evaluated" in capsys.readouterr().out and config.read_text() == text
        assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}.items() >= before.items()
        before[config] = config.stat().st_mtime_ns


def test_other_cut_offs_and_baselines_use_the_scores_there_are(run: Path, done: Path, alone: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("part-*.jsonl")}
    config = write_config(run, "other.yaml", evaluate={"top_k": [2], "baselines": ["bm25", "recency", "no_recent"]})
    evaluate(config, "RUN/merged", output=str(done))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    results = numbers_of(done)
    assert set(results["metrics"]) == {"recall@2", "mrr@2", "ndcg@2", "auc"}
    assert set(results["baselines"]) == {"random", "control", "no_recent", "bm25", "recency"}
    assert results["metrics"]["auc"] == numbers_of(alone)["metrics"]["auc"]


def test_scores_of_another_evaluation_are_refused(run: Path, done: Path) -> None:
    config = load_config(run / "config.yaml")
    with pytest.raises(RunError, match="made with input model="):
        evaluate(config, "RUN/base", output=str(done))
    with pytest.raises(RunError, match=r"test/model: holds scores made with seed=0, now 1"):
        evaluate(write_config(run, "seed.yaml", run={"seed": 1}), "RUN/merged", output=str(done))
    with pytest.raises(RunError, match="row_tokens=2048, now 1024"):
        evaluate(write_config(run, "rows.yaml", evaluate={"row_tokens": 1024}), "RUN/merged", output=str(done))


def test_force_scores_again(run: Path, done: Path, alone: Path) -> None:
    part = done / "test" / "model" / "part-000001.jsonl"
    part.write_bytes(b"")
    evaluate(load_config(run / "config.yaml"), "RUN/merged", output=str(done), force=True)
    assert_equal(done, alone)


def test_what_is_missing_or_doubled_is_named(run: Path, done: Path) -> None:
    config, folder = load_config(run / "config.yaml"), done / "test" / "control"
    user, item = next(iter(scores_of(done, "control")))
    (done / "test.json").unlink()
    shutil.copy(folder / "part-000000.jsonl", folder / "part-000007.jsonl")
    with pytest.raises(DataError, match=r"control/part-000007.jsonl: no part of this evaluation"):
        evaluate(config, "RUN/merged", output=str(done))
    (folder / "part-000007.jsonl").unlink()
    first = folder / "part-000000.jsonl"
    whole = first.read_text()
    first.write_text(whole + whole)
    with pytest.raises(DataError, match=rf"control/part-000000.jsonl: .*doubled \(\('{user}', "):
        evaluate(config, "RUN/merged", output=str(done))
    first.write_text(whole)
    lines = (folder / "part-000000.jsonl").read_text().splitlines(keepends=True)
    (folder / "part-000000.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(DataError, match=rf"1 of \d+ \(user, item, label\) missing \(\('{user}', '{item}', [01]\)\)"):
        evaluate(config, "RUN/merged", output=str(done))
    assert not (done / "test.json").exists()


def test_what_cannot_be_evaluated_is_refused(run: Path, tmp_path: Path) -> None:
    answers = write_config(run, "answers.yaml", prompt={"answers": ["no", "yes"]})
    with pytest.raises(ModelError, match=r"trained to answer \('yes', 'no'\)"):
        evaluate(answers, "RUN/merged", output=str(tmp_path))
    divided = write_config(run, "zero2.yaml", evaluate={"deepspeed_config": "ds_configs/zero2.json"})
    with pytest.raises(ConfigError, match="ZeRO stage 2 divides no weights"):
        evaluate(divided, "RUN/merged", output=str(tmp_path))


def test_a_pointer_that_moves_names_another_model(run: Path, alone: Path, tmp_path: Path) -> None:
    """checkpoints/best is followed once, so that neither stale nor mixed scores are published."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints" / "step-000007", checkpoints / "step-000007")
    shutil.copytree(run / "checkpoints" / "step-000007", checkpoints / "step-000014")
    provenance = checkpoints / "step-000014" / "provenance.json"
    write_json(provenance, read_json(provenance) | {"train": {"step": 14}})
    seal(checkpoints / "step-000014")
    (checkpoints / "best").write_text("step-000007\n")
    config = load_config(run / "config.yaml", ["evaluate.max_users=8", "evaluate.baselines=[]"])
    evaluate(config, str(checkpoints / "best"), output=str(tmp_path / "out"))
    (checkpoints / "best").write_text("step-000014\n")
    with pytest.raises(RunError, match="made with input model="):
        evaluate(config, str(checkpoints / "best"), output=str(tmp_path / "out"))


def test_other_prompts_of_a_plain_model_are_no_finished_evaluation(run: Path, tmp_path: Path) -> None:
    few = ["evaluate.max_users=8", "evaluate.baselines=[]"]
    evaluate(load_config(run / "config.yaml", few), "RUN/base", output=str(tmp_path))
    with pytest.raises(RunError, match="prompt"):
        evaluate(load_config(run / "config.yaml", [*few, "prompt.recent_items=0"]), "RUN/base", output=str(tmp_path))


def test_identities_tell_models_apart(run: Path, tmp_path: Path) -> None:
    """Of large files the fingerprint reads samples; a merged folder's manifest holds the adapter's hash."""
    assert model_identity(str(run / "merged")) == manifest_hash(run / "merged")
    assert model_identity("org/tiny") != model_identity("org/tiny", "abc")
    adapter = shutil.copytree(run / "checkpoints" / "step-000007" / "adapter", tmp_path / "adapter")
    before = model_identity(str(adapter))
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", config | {"lora_alpha": 2 * config["lora_alpha"]})
    assert model_identity(str(adapter)) != before


def test_each_split_has_its_turn_on_the_report(run: Path, tmp_path: Path) -> None:
    few = ["evaluate.max_users=8", "evaluate.baselines=[]"]
    for split in ("test", "valid", "test"):
        evaluate(
            load_config(run / "config.yaml", [*few, f"evaluate.split={split}"]), "RUN/merged", output=str(tmp_path)
        )
        assert f"8 {split} users" in (tmp_path / "report.html").read_text()
    results, report = tmp_path / "test.json", tmp_path / "report.html"
    before = results.stat().st_mtime_ns
    evaluate(load_config(run / "config.yaml", few), "RUN/merged", output=str(tmp_path))
    assert results.stat().st_mtime_ns == before, "it was done already"
    report.write_text("8 test users, in the words of another report")
    evaluate(load_config(run / "config.yaml", few), "RUN/merged", output=str(tmp_path))
    assert results.stat().st_mtime_ns > before and "<html" in report.read_text()
