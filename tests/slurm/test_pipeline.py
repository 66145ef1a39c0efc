"""The chain of jobs: it cannot hang, can be taken up half done, and ends in the same numbers whatever disturbs it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from random import Random

import pytest

from tests.chaos.chain import Chain
from tests.chaos.compare import differences, leftovers
from tests.chaos.faults import World
from tests.chaos.storm import Storm
from tests.slurm.lab import Lab, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SMALL = [
    "demo.num_users=240", "demo.num_items=200", "summarize.users_per_shard=20", "summarize.lease_seconds=8",
    "base.steps=5", "base.hidden_size=32", "base.num_layers=2", "base.intermediate_size=64", "base.vocab_size=600",
    "train.max_steps=12", "train.save_every_steps=4", "train.log_every_steps=1", "train.rows_per_step=4",
    "train.learning_rate=1e-3", "evaluate.bootstrap_samples=20",
]  # fmt: skip
OPTIONS = {
    "TRSR_SUMMARIZE_OPTIONS": "--nodes=2 --ntasks-per-node=1",
    "TRSR_TRAIN_OPTIONS": "--nodes=2 --ntasks-per-node=1",
    "TRSR_EVALUATE_OPTIONS": "--nodes=2 --ntasks-per-node=1",
}


def pipeline(lab: Lab, *overrides: str, **env: str) -> tuple[str, dict[str, str]]:
    """Submit the chain; what it said, and the stages' job ids."""
    said = lab.run(f"slurm/pipeline.sh configs/quickstart.yaml {' '.join(overrides)}", env={**OPTIONS, **env})
    return said, dict(re.findall(r"^(\w+): job (\d+)", said, re.M))


def finish(lab: Lab, run: Path, jobs: dict[str, str], seconds: float = 300) -> None:
    """Wait for all jobs; each must have completed."""
    for stage, job in jobs.items():
        state = lab.wait_for_job(job, seconds=seconds)
        assert state == "COMPLETED", (run / "logs" / f"{stage}-{job}.out").read_text()[-3000:]


def result(run: Path) -> dict[str, object]:
    return json.loads((run / "evaluation" / "test.json").read_text())


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_prepare_on_several_tasks_writes_what_one_writes(lab: Lab, tmp_path: Path) -> None:
    lab.wait_for_nodes(3)
    for name, options in {"one": "", "four": "--nodes=2 --ntasks=4"}.items():
        settings = f"configs/quickstart.yaml demo.num_users=240 run.dir={tmp_path}/{name}"
        job = lab.run(f"sbatch --parsable -o {tmp_path}/{name}.out {options} slurm/single.sbatch prepare {settings}")
        assert lab.wait_for_job(job.strip()) == "COMPLETED", (tmp_path / f"{name}.out").read_text()
    one, four = (tmp_path / name / "histories" for name in ("one", "four"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in four.iterdir()
    }
    assert len(list(tmp_path.glob("four/logs/prepare-*/task-*"))) == 4


def test_failed_stage_ends_the_chain(lab: Lab, tmp_path: Path) -> None:
    lab.wait_for_nodes(3)
    overrides = ["data.format=jsonl", "data.path=/nonexistent", f"run.dir={tmp_path}/run"]
    said, jobs = pipeline(lab, *overrides)
    assert list(jobs) == ["prepare", "summarize", "base", "train", "merge", "evaluate"]
    assert "squeue -j" in said and "tail -F" in said
    assert lab.wait_for_job(jobs["prepare"]) == "FAILED"
    assert {lab.wait_for_job(jobs[stage], seconds=60) for stage in list(jobs)[1:]} == {"CANCELLED"}


def test_chain_is_taken_up_where_it_stands(lab: Lab, tmp_path: Path) -> None:
    lab.wait_for_nodes(3)
    overrides = [*SMALL, f"run.dir={tmp_path}/run"]
    lab.run("scontrol update PartitionName=batch State=DOWN")  # jobs are queued and wait
    _, jobs = pipeline(lab, *overrides)
    said, again = pipeline(lab, *overrides)
    lab.run("scontrol update PartitionName=batch State=UP")
    assert again == jobs and said.count("is in the queue already") == 6
    assert lab.wait_for_job(jobs["prepare"]) == "COMPLETED"
    lab.run(f"scancel {' '.join(list(jobs.values())[1:])}")
    for job in list(jobs.values())[1:]:
        lab.wait_for_job(job)
    lab.wait_for_nodes(3)
    said, rest = pipeline(lab, *overrides)
    assert "prepare: finished already" in said and "summarize" in rest
    lab.run(f"scancel {' '.join(rest.values())}")


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    lab.wait_for_nodes(3)
    run = tmp_path_factory.mktemp("calm") / "run"
    finish(lab, run, pipeline(lab, *SMALL, f"run.dir={run}")[1])
    return run


def test_a_longer_training_is_merged_and_evaluated_again(lab: Lab, tmp_path: Path, undisturbed: Path) -> None:
    """In a folder whose name has a blank; then nothing is left to do."""
    run = tmp_path / "my run"
    shutil.copytree(undisturbed, run)
    overrides = [*SMALL, "train.max_steps=16", f"'run.dir={run}'"]
    _, jobs = pipeline(lab, *overrides)
    finish(lab, run, jobs)
    assert '"checkpoint step-000016"' in (run / "merged" / "provenance.json").read_text()
    assert result(run)["metrics"] != result(undisturbed)["metrics"]
    said, jobs = pipeline(lab, *overrides)
    assert jobs == {} and said.count("finished already") == 6, said


def preempt(lab: Lab, job: str) -> None:
    """Let an urgent job take all nodes for a moment."""
    lab.wait_for_job(job, "RUNNING", seconds=200)
    urgent = lab.run("sbatch --parsable -p urgent -N3 --exclusive -o /dev/null --wrap 'sleep 1'").strip()
    assert lab.wait_for_job(urgent, seconds=60) == "COMPLETED"


def test_preempted_in_every_stage_with_the_same_result(lab: Lab, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    _, jobs = pipeline(lab, *SMALL, f"run.dir={run}")
    for stage in ("summarize", "train", "evaluate"):
        wait_until(lambda stage=stage: has_begun(run, stage), 200, f"{stage} at work", lab.queue)
        preempt(lab, jobs[stage])
    finish(lab, run, jobs)
    assert all(lab.job(jobs[stage])["Restarts"] == "1" for stage in ("summarize", "train", "evaluate"))
    assert_same(run, undisturbed)


def has_begun(run: Path, stage: str) -> bool:
    """Whether a stage is past its start-up."""
    logs = [path.read_text() for path in run.glob(f"logs/{stage}-*/task-0000-*.log")]
    return any(f"{stage}.py" in text for text in logs)


def assert_same(run: Path, other: Path) -> None:
    """Equal shards, equal losses, equal metrics."""
    for split in ("train", "valid", "test"):
        tars = [
            {path.name: path.read_bytes() for path in folder.glob(f"shards/{split}/*.tar")} for folder in (run, other)
        ]
        assert tars[0] == tars[1] and tars[0]
    assert losses(run) == pytest.approx(losses(other), abs=1e-5)
    assert result(run)["metrics"] == pytest.approx(result(other)["metrics"], abs=1e-6)


@pytest.mark.soak
def test_six_faults_at_random_change_nothing(lab: Lab, tmp_path: Path, undisturbed: Path) -> None:
    """A short schedule of ``make chaos``."""
    lab.wait_for_nodes(3)
    draw, lines = Random(0), list[str]()
    world = World(lab, Chain(lab, tmp_path / "run", SMALL, draw), draw, last_step=12)
    Storm(world, 6, draw, ["rank", "launcher", "slurmd", "requeue", "cancel"], lines.append).run(400)
    found = [*differences(tmp_path / "run", undisturbed, 12), *leftovers(world)]
    assert not found, "\n".join([*lines, *found])


def test_training_goes_on_with_another_number_of_nodes(lab: Lab, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    lab.run(f"mkdir -p {run} && cp -r {undisturbed}/histories {undisturbed}/base {undisturbed}/shards {run}/")
    settings = f"configs/quickstart.yaml {' '.join(SMALL)} run.dir={run}"
    script = "sbatch --parsable --ntasks-per-node=1 -o {run}/{nodes}.out -N{nodes} slurm/train.sbatch {settings}"
    first = lab.run(script.format(run=run, nodes=3, settings=settings)).strip()
    wait_until(lambda: (run / "checkpoints" / "step-000004").exists(), 200, "a checkpoint", lab.queue)
    lab.run(f"scancel {first}")
    lab.wait_for_job(first)
    second = lab.run(script.format(run=run, nodes=1, settings=settings)).strip()
    assert lab.wait_for_job(second, seconds=200) == "COMPLETED", (run / "1.out").read_text()
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-5)
