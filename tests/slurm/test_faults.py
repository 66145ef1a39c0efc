"""Nodes that die, are cut off or run out of time. Slow, because Slurm notices slowly; the times are printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, wait_until
from tests.slurm.test_restart import Count

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.timeout(400)]


@pytest.fixture
def two_nodes(lab: Lab, tmp_path: Path) -> Iterator[Count]:
    """A counter on node1 (with the batch script) and node2, at work; node3 is spare."""
    lab.wait_for_nodes(3, 120)
    job = Count(lab, tmp_path, "-N2", "--ntasks-per-node=1", "-w", "node1,node2", STEPS="200")
    job.wait_for_step(10)
    yield job
    lab.wait_for_nodes(3, 120)


def notice(job: Count, start: float) -> float:
    """Seconds until Slurm has taken the job off its nodes."""
    wait_until(lambda: job.lab.job(job.job).get("JobState") != "RUNNING", 120, "noticed", job.lab.queue)
    return time.monotonic() - start


def test_power_cut_of_a_node(two_nodes: Count, report: Callable[..., None]) -> None:
    start = time.monotonic()
    two_nodes.lab.power_off("node2")
    report("power cut of a node: noticed after", notice(two_nodes, start))
    two_nodes.lab.boot("node2")
    two_nodes.assert_complete(restarts=1, steps=200)
    report("power cut of a node: finished after", time.monotonic() - start)


def test_power_cut_of_the_batch_node(two_nodes: Count, report: Callable[..., None]) -> None:
    start = time.monotonic()
    two_nodes.lab.power_off("node1")
    report("power cut of the batch node: noticed after", notice(two_nodes, start))
    two_nodes.lab.boot("node1")
    two_nodes.assert_complete(restarts=1, steps=200)
    report("power cut of the batch node: finished after", time.monotonic() - start)


def test_cut_off_task_publishes_nothing(lab: Lab, tmp_path: Path, report: Callable[..., None]) -> None:
    """The old task lives on behind a broken network, with the shared disk in reach, while its job runs elsewhere."""
    lab.wait_for_nodes(3, 120)
    target = tmp_path / "published"
    command = f"srun python tests/slurm/publisher.py {target} ${{SLURM_RESTART_COUNT:-0}}"
    options = f"--parsable --requeue --open-mode=append -N1 -o {tmp_path}/out"
    job = lab.run(f"sbatch {options} --wrap '{command}'").strip()
    wait_until(lambda: (tmp_path / "held-0").exists(), 60, "the first start holds the lock", lab.queue)
    node, start = lab.job(job)["BatchHost"], time.monotonic()
    lab.unplug(node)
    try:
        wait_until(lambda: (tmp_path / "held-1").exists(), 120, "the second start holds the lock", lab.queue)
        report("network cut: taken over after", time.monotonic() - start)
        assert "publisher.py" in lab.run("ps ax", on=node), "the old task lives on"
        (tmp_path / "go-1").touch()
        assert lab.wait_for_job(job, seconds=60) == "COMPLETED"
        (tmp_path / "go-0").touch()
        wait_until(lambda: "publisher.py" not in lab.run("ps ax", on=node), 30, "the old task ends")
        assert (target / "restart").read_text() == "1"
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".published.tmp")]
    finally:
        lab.plug(node)
    lab.wait_for_nodes(3, 120)


def test_counting_goes_on_after_a_network_cut(two_nodes: Count, report: Callable[..., None]) -> None:
    start = time.monotonic()
    two_nodes.lab.unplug("node2")
    try:
        report("network cut of a node: noticed after", notice(two_nodes, start))
        two_nodes.lab.run(f"kill -9 $(cat {two_nodes.run}/count/.pid-1)", on="node2")
    finally:
        two_nodes.lab.plug("node2")
    two_nodes.assert_complete(restarts=1, steps=200)


def test_dead_slurmd(two_nodes: Count, report: Callable[..., None]) -> None:
    start = time.monotonic()
    two_nodes.lab.stop_daemon("node2", with_signal="KILL")
    report("slurmd killed: noticed after", notice(two_nodes, start))
    two_nodes.lab.run(f"kill -9 $(cat {two_nodes.run}/count/.pid-1)", on="node2", check=False)
    two_nodes.lab.start_daemon("node2")
    two_nodes.assert_complete(restarts=1, steps=200)


def test_time_limit(lab: Lab, tmp_path: Path, report: Callable[..., None]) -> None:
    lab.wait_for_nodes(3, 120)
    start = time.monotonic()
    job = Count(lab, tmp_path, "-N2", "--ntasks-per-node=1", "--time=1", STEPS="900")
    job.assert_complete(restarts=int(lab_restarts(job)), steps=900)
    assert "asks to be run again" in job.text()
    report("90 s of work under a limit of 1 minute took", time.monotonic() - start)


def lab_restarts(job: Count) -> str:
    """Restarts of the job once it has ended, which must be some."""
    job.lab.wait_for_job(job.job, seconds=300)
    restarts = job.lab.job(job.job)["Restarts"]
    assert restarts != "0", job.text()
    return restarts
