"""A real training under the slow faults: losses, checkpoints and metrics as if nothing had happened."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.slurm.lab import Lab, wait_until
from tests.train.jobs import Job
from tests.train.world import link_run, losses_of, make_config, make_run
from trsr_dist.files import read_json
from trsr_dist.metric_log import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.timeout(600)]
NUM_STEPS = 400
SETTINGS = {
    "max_steps": NUM_STEPS,
    "save_every_steps": 20,
    "rows_per_step": 8,
    "timeout_seconds": 20,
    "learning_rate": 2e-4,
}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing happened to, on one rank and without Slurm."""
    run = make_run(tmp_path_factory.mktemp("calm") / "run")
    make_config(run, train=SETTINGS)
    job = Job(run, "alone")
    assert job.process.wait(300) == 0, job.output
    return run


class Training:
    """A submitted training with the shards and base of another run."""

    def __init__(self, lab: Lab, run: Path, source: Path, options: str) -> None:
        self.lab, self.run, self.out = lab, link_run(run, source), run.with_name("out")
        make_config(run, train=SETTINGS)
        lab.wait_for_nodes(3, 120)
        lab.wait_for_nodes(3, 120)
        script = f"sbatch --parsable -o {self.out} {options} slurm/train.sbatch {run}/config.yaml"
        self.job = lab.run(script).strip()
        self.wait_for_step(45)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: max(losses_of(self.run), default=0) >= step, 120, f"step {step}", self.text)

    def text(self) -> str:
        return self.out.read_text() if self.out.exists() else self.lab.queue()

    def log(self, restart: int) -> str:
        """What rank 0 said in one start."""
        found = list(self.run.glob(f"logs/train-*/task-0000-restart-{restart}.log"))
        return found[0].read_text() if found else ""

    def assert_same(self, calm: Path) -> None:
        """Every step once, with the loss of the run that nothing happened to, and the same adapter in the end."""
        assert self.lab.wait_for_job(self.job, seconds=300) == "COMPLETED", self.text()
        assert self.lab.job(self.job)["Restarts"] == "1", self.text()
        steps = [row["step"] for row in read_metrics(self.run) if "train/loss" in row]
        assert steps == list(range(1, NUM_STEPS + 1))
        assert losses_of(self.run) == pytest.approx(losses_of(calm), abs=1e-5)
        name = f"checkpoints/step-{NUM_STEPS:06d}/adapter/adapter_model.safetensors"
        mine, its = load_file(self.run / name), load_file(calm / name)
        assert all((mine[key] - its[key]).abs().max() < 1e-4 for key in its) and mine.keys() == its.keys()


def test_killed_rank_is_back_on_its_nodes(lab: Lab, tmp_path: Path, report: Callable[..., None]) -> None:
    """Part by part."""
    training = Training(lab, tmp_path / "run", make_run(tmp_path / "source"), "-N2 --ntasks-per-node=1")
    beat = lambda rank: read_json(training.run / f"heartbeats/rank-{rank:05d}.json")  # noqa: E731
    start = time.monotonic()
    lab.run(f"kill -9 {beat(1)['pid']}", on="node2")
    for part, is_over in {
        "noticed": lambda: "run again on the same nodes" in training.text(),
        "tasks started": lambda: "launch/train.py" in training.log(1),
        "imported": lambda: beat(0)["restart"] == 1,
        "base and checkpoint loaded": lambda: "resumed from" in training.log(1),
        "first step made": lambda: re.search(r"step \d+/", training.log(1)) is not None,
    }.items():
        wait_until(is_over, 120, part, training.text)
        report(f"training, rank killed: {part} after", time.monotonic() - start)
    assert lab.job(training.job)["Restarts"] == "0", training.text()
    lab.run(f"scancel {training.job}")
    lab.wait_for_job(training.job)


def test_power_cut_of_a_node(lab: Lab, calm: Path, tmp_path: Path, report: Callable[..., None]) -> None:
    """The node stays dark until the end: Slurm retries what it could not tell it, and steps have the same names."""
    training = Training(lab, tmp_path / "run", calm, "-N2 --ntasks-per-node=1")
    assert lab.job(training.job)["NodeList"] == "node[1-2]"
    start = time.monotonic()
    lab.power_off("node2")
    try:
        wait_until(lambda: lab.job(training.job).get("JobState") != "RUNNING", 120, "noticed", lab.queue)
        report("training, power cut of a node: noticed after", time.monotonic() - start)
        wait_until(lambda: "resumed from" in training.log(1), 120, "the second start goes on", training.text)
        report("training, power cut of a node: at work again after", time.monotonic() - start)
        training.assert_same(calm)
    finally:
        lab.boot("node2")
    lab.wait_for_nodes(3, 120)


def test_cut_off_training_publishes_nothing(lab: Lab, calm: Path, tmp_path: Path, report: Callable[..., None]) -> None:
    """The old trainer goes on at full speed behind the broken network, with the shared disk in reach."""
    training = Training(lab, tmp_path / "run", calm, "-N1 --ntasks=1")
    node, start = lab.job(training.job)["BatchHost"], time.monotonic()
    lab.unplug(node)
    try:
        wait_until(lambda: "resumed from" in training.log(1), 120, "the second start goes on", training.text)
        report("training, network cut: at work elsewhere after", time.monotonic() - start)
        wait_until(lambda: "checkpoints.lock: lost to" in training.log(0), 60, "the old one ends", training.text)
        report("training, network cut: the old one ended after", time.monotonic() - start)
        training.assert_same(calm)
    finally:
        lab.plug(node)
    lab.wait_for_nodes(3, 120)
