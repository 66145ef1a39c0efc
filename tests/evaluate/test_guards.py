"""What an evaluation refuses, and what it leaves alone: other lists, histories, bases and jobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.evaluate.world import numbers_of, parts_of, write_config
from tests.merge.models import make_base
from trsr_dist.config import Config, load_config
from trsr_dist.errors import ConfigError, DataError, ModelError, RunError
from trsr_dist.evaluate import report
from trsr_dist.evaluate.job import evaluate
from trsr_dist.evaluate.score_files import ScoreFolder
from trsr_dist.evaluate.teacher import score_shards
from trsr_dist.files import read_json, write_json
from trsr_dist.locks import CLAIMS
from trsr_dist.metric_log import read_metrics

FEW = ("evaluate.max_users=70", "evaluate.baselines=[]")


def few(run: Path, *overrides: str) -> Config:
    return load_config(run / "config.yaml", [*FEW, *overrides])


@pytest.fixture(scope="module")
def scored(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of an evaluation of few users."""
    output = tmp_path_factory.mktemp("few")
    evaluate(few(run), "RUN/merged", output=str(output))
    return output


@pytest.fixture
def done(scored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(scored, tmp_path / "done")


@pytest.fixture
def other_run(run: Path, tmp_path: Path) -> Path:
    """The same run with a copy of the split to change."""
    root = tmp_path / "other"
    write_config(root)
    for name in ("histories", "base", "merged", "checkpoints"):
        (root / name).symlink_to(run / name)
    shutil.copytree(run / "shards" / "test", root / "shards" / "test")
    (root / "shards" / "train").symlink_to(run / "shards" / "train")
    return root


def test_lists_are_called_what_they_were_drawn_as(run: Path, done: Path) -> None:
    assert numbers_of(done)["candidates"] == "targets"
    for change, message in (
        ("data.candidates=uniform", "data.candidates=uniform: .* were drawn with targets .*evaluate.protocols"),
        ("evaluate.negatives_per_positive=50", "evaluate.negatives_per_positive=50: .* were drawn with 6 "),
        ("data.seen_before_target=true", "data.seen_before_target=True: .* were drawn with False "),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(few(run, change, "evaluate.protocols=[uniform]"), "RUN/merged", output=str(done))


def test_shards_of_other_histories_are_refused(other_run: Path, tmp_path: Path) -> None:
    path = other_run / "shards" / "test" / "manifest.json"
    manifest = read_json(path)
    write_json(path, manifest | {"inputs": {"histories": "0" * 64}})
    with pytest.raises(RunError, match=r"shards/test: made from the histories 0{12}\.\.\., .*summarize.py again"):
        evaluate(few(other_run), "RUN/merged", output=str(tmp_path / "out"))
    write_json(path, manifest | {"shards": []})
    with pytest.raises(DataError, match=r"shards/test: no user .* data.split a share for test"):
        evaluate(few(other_run), "RUN/merged", output=str(tmp_path / "out"))


def test_force_removes_nothing_for_a_model_that_does_not_open(run: Path, done: Path, tmp_path: Path) -> None:
    before = parts_of(done)
    with pytest.raises(ModelError, match="mergd: no such folder"):
        evaluate(few(run), "RUN/mergd", output=str(done), force=True)
    broken = shutil.copytree(run / "merged", tmp_path / "broken")
    next(broken.glob("*.safetensors")).write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="not a safetensors file"):
        evaluate(few(run), str(broken), output=str(done), force=True)
    assert parts_of(done) == before and (done / "test.json").is_file()


def test_an_array_is_told_which_folder_to_remove(run: Path, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks cannot be forced, each of which would remove what the others write."""
    before = parts_of(done)
    for name, value in (("ID", "0"), ("MIN", "0"), ("MAX", "1"), ("COUNT", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(RunError, match=r"done/test: made with input model=.*in a Slurm array: remove the folder"):
        evaluate(few(run), "RUN/base", output=str(done))
    with pytest.raises(ConfigError, match=rf"remove {done}/test and submit the array again without it"):
        evaluate(few(run), "RUN/base", output=str(done), force=True)
    with pytest.raises(ConfigError, match=rf"remove {run}/shards/train/scores-\S+ and submit the array again"):
        score_shards(few(run), "RUN/merged", force=True)
    assert parts_of(done) == before
    shutil.rmtree(done / "test")
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        evaluate(few(run), "RUN/base", output=str(done))
    assert numbers_of(done)["model"] == f"{run}/base" and parts_of(done) != before


def test_an_array_with_gaps_shares_out_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks that failed are submitted again, and what they are dealt is not what they were dealt before."""
    for name, value in (("MIN", "3"), ("MAX", "7"), ("COUNT", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    for task in ("3", "7"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        with pytest.raises(ConfigError, match="2 tasks from 3 to 7.* --array=0-1"):
            evaluate(few(run), "RUN/merged", output=str(tmp_path))


def test_a_job_with_other_settings_is_kept_out(
    run: Path, tmp_path: Path, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while another one writes, and would remove that one's scores."""
    write, tried = ScoreFolder.write, []

    def interrupted(self: ScoreFolder, part: int, users: list) -> None:
        if not tried:
            tried.append(part)
            with pytest.raises(RunError, match=r"test: another job .* is at work here with model='.*', now '"):
                evaluate(few(run), "RUN/base", output=str(tmp_path), force=True)
        write(self, part, users)

    monkeypatch.setattr(ScoreFolder, "write", interrupted)
    evaluate(few(run), "RUN/merged", output=str(tmp_path))
    assert tried and parts_of(tmp_path) == parts_of(scored)
    assert not list((tmp_path / "test" / CLAIMS).iterdir())


def test_the_base_is_the_one_that_the_model_was_trained_from(run: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "qwen3")
    with_base = ["evaluate.max_users=8", "evaluate.baselines=[base]"]
    outputs = []
    for number, name in enumerate((str(other), "RUN/base")):
        config = load_config(run / "config.yaml", [*with_base, f"model.name_or_path={name}"])
        evaluate(config, "RUN/merged", output=str(tmp_path / str(number)))
        outputs.append(parts_of(tmp_path / str(number), "base"))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("kind", ["missing", "changed"])
def test_a_base_that_is_not_the_models_is_found_before_anything_is_scored(run: Path, tmp_path: Path, kind: str) -> None:
    merged = shutil.copytree(run / "merged", tmp_path / "merged")
    base = make_base(tmp_path / "another", "qwen3") if kind == "changed" else tmp_path / "nowhere"
    provenance = read_json(merged / "provenance.json")
    base_facts = provenance["base"] | {"name_or_path": str(base), "fingerprint": "0" * 64}
    write_json(merged / "provenance.json", provenance | {"base": base_facts})
    message = "not the base of the training" if kind == "changed" else "no such model folder; set model.name_or_path"
    with pytest.raises(ModelError, match=message):
        evaluate(load_config(run / "config.yaml"), str(merged), output=str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("part-*"))


def test_a_kill_while_publishing_leaves_nothing_that_passes_for_finished(
    run: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_metrics", die)
        with pytest.raises(KeyboardInterrupt):
            evaluate(few(run, "evaluate.top_k=[2]"), "RUN/merged", output=str(done))
    evaluate(few(run), "RUN/merged", output=str(done))
    assert "recall@3" in numbers_of(done)["metrics"]


def test_an_output_elsewhere_leaves_the_run_as_it_is(run: Path, scored: Path) -> None:
    assert not (run / "config" / "evaluate.yaml").exists()
    assert "evaluate" not in {row["stage"] for row in read_metrics(run)}
    assert "evaluate" in (scored / "config" / "evaluate.yaml").read_text()
    assert [row["stage"] for row in read_metrics(scored)] == ["evaluate"]


def test_scores_that_are_all_there_need_neither_weights_nor_the_device(run: Path, tmp_path: Path) -> None:
    merged, output = shutil.copytree(run / "merged", tmp_path / "merged"), tmp_path / "out"
    evaluate(few(run, "train.precision=bfloat16"), str(merged), output=str(output))
    for path in merged.glob("*.safetensors"):
        path.unlink()
    evaluate(few(run, "train.precision=auto", "evaluate.top_k=[2]"), str(merged), output=str(output))
    assert "recall@2" in numbers_of(output)["metrics"]
    with pytest.raises(RunError, match="precision='bfloat16', now 'float32'; use another --output"):
        evaluate(few(run, "train.precision=float32"), str(merged), output=str(output))
    next((output / "test" / "model").glob("part-*")).unlink()
    with pytest.raises(ModelError, match="weights"):
        evaluate(few(run, "train.precision=bfloat16", "evaluate.top_k=[3]"), str(merged), output=str(output))


def test_users_that_the_model_may_have_been_trained_on_are_noticed(
    run: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert numbers_of(scored)["trained_on_these_shards"] is True
    assert "among those it was trained on" not in (scored / "report.html").read_text()
    merged, output = shutil.copytree(run / "merged", tmp_path / "merged"), tmp_path / "out"
    provenance = read_json(merged / "provenance.json")
    write_json(merged / "provenance.json", provenance | {"shards": {"train": "0" * 64}})
    evaluate(few(run), str(merged), output=str(output))
    assert numbers_of(output)["trained_on_these_shards"] is False
    assert "among those it was trained on" in (output / "report.html").read_text()
    assert "was trained on other shards (000000000000...)" in capsys.readouterr().out


def test_damaged_histories_are_refused_before_anything_is_scored(run: Path, other_run: Path, tmp_path: Path) -> None:
    histories = other_run / "histories"
    histories.unlink()
    shutil.copytree(run / "histories", histories)
    content = bytearray((histories / "items.arrow").read_bytes())
    content[len(content) // 2] ^= 4
    (histories / "items.arrow").write_bytes(content)
    with pytest.raises(DataError, match=r"items\.arrow: damaged: .*tools/prepare_data\.py --force"):
        evaluate(few(other_run), "RUN/merged", output=str(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("part-*"))
