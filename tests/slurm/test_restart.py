"""What the job scripts do when a job is stopped, broken or wrong, on real daemons. A small counter plays the stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, wait_until

pytestmark = pytest.mark.slurm
STEPS = 40
CONFIG = "configs/quickstart.yaml"


class Count:
    """A submitted counter job."""

    def __init__(self, lab: Lab, folder: Path, *options: str, **env: str) -> None:
        self.lab, self.run, self.out = lab, folder / "run", folder / "out"
        arguments = f"--parsable --output={self.out} {' '.join(options)} tests/slurm/counter.sbatch"
        script = f"sbatch {arguments} {CONFIG} run.dir={self.run}"
        self.job = lab.run(script, env={"STEPS": str(STEPS), **env}).strip()

    def steps(self, rank: int) -> list[int]:
        path = self.run / "count" / f"steps-{rank}"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait_for_step(self, step: int, ranks: int = 2) -> None:
        reached = lambda: min(len(self.steps(rank)) for rank in range(ranks)) >= step  # noqa: E731
        wait_until(reached, 60, f"step {step}", self.text)

    def text(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def assert_complete(self, restarts: int, ranks: int = 2, steps: int = STEPS, here: int = 0) -> None:
        """Every step once, in order, whatever happened in between: requeued, or run again on the same nodes."""
        assert self.lab.wait_for_job(self.job, seconds=200) == "COMPLETED", self.text()
        assert self.lab.job(self.job)["Restarts"] == str(restarts), self.text()
        assert self.text().count("run again on the same nodes") == here, self.text()
        assert all(self.steps(rank) == list(range(1, steps + 1)) for rank in range(ranks)), self.text()


@pytest.fixture
def count(lab: Lab, tmp_path: Path) -> Callable[..., Count]:
    lab.wait_for_nodes(3)
    return lambda *options, **env: Count(lab, tmp_path, *(options or ("-N2", "--ntasks-per-node=1")), **env)


def test_undisturbed_job_logs_each_task_and_shows_the_first(count: Callable[..., Count]) -> None:
    job = count("-N2", "--ntasks-per-node=2")
    job.assert_complete(restarts=0, ranks=4)
    assert "task 0 starts" in job.text() and "task 1 starts" not in job.text()
    logs = sorted(path.name for path in job.run.glob("logs/count-*/task-*"))
    assert logs == [f"task-{rank:04d}-restart-0.log" for rank in range(4)]


def test_gpus_decide_the_number_of_tasks(count: Callable[..., Count]) -> None:
    job = count("-N2", "--gpus-per-node=2", "--cpus-per-gpu=1")
    job.assert_complete(restarts=0, ranks=4)


def test_steps_have_what_the_script_sets_where_the_job_has_no_environment(count: Callable[..., Count]) -> None:
    job = count("-N2", "--ntasks-per-node=1", "--export=PATH,HOME,STEPS,TRSR_SITE,SLURM_CONF")
    job.assert_complete(restarts=0)


def test_requeue_by_hand(count: Callable[..., Count]) -> None:
    job = count()
    job.wait_for_step(10)
    job.lab.run(f"scontrol requeue {job.job}")
    job.assert_complete(restarts=1)
    assert "starts at step 1\n" in job.text() and "restart 1" in job.text()


def test_preempted_by_an_urgent_job(count: Callable[..., Count]) -> None:
    job = count("-N3", "--ntasks-per-node=1", "--exclusive")
    job.wait_for_step(10, ranks=3)
    urgent = job.lab.run("sbatch --parsable -p urgent -N1 --exclusive -o /dev/null --wrap 'sleep 1'").strip()
    assert job.lab.wait_for_job(urgent) == "COMPLETED"
    job.assert_complete(restarts=1, ranks=3)


def test_time_is_nearly_up(count: Callable[..., Count]) -> None:
    """``--signal`` sends the same to the tasks; Slurm looks at time limits only twice a minute."""
    job = count()
    job.wait_for_step(10)
    job.lab.run(f"scancel --signal=TERM {job.job}")
    job.assert_complete(restarts=1)
    assert "asks to be run again" in job.text()


def test_last_element_of_an_array_is_stopped(count: Callable[..., Count]) -> None:
    """Its job number is the array's own; it alone is requeued."""
    job = count("--array=0-1", "-n1")
    wait_until(lambda: all(len(steps_of(job, element)) >= 10 for element in (0, 1)), 60, "step 10", job.text)
    job.lab.run(f"scancel --signal=TERM {job.job}_1")
    done = lambda: {one["JobState"] for one in job.lab.jobs(job.job)} == {"COMPLETED"}  # noqa: E731
    wait_until(done, 100, "both elements complete", job.text)
    restarts = {one["ArrayTaskId"]: one["Restarts"] for one in job.lab.jobs(job.job)}
    assert restarts == {"0": "0", "1": "1"}
    assert all(steps_of(job, element) == list(range(1, STEPS + 1)) for element in (0, 1)), job.text()


def steps_of(job: Count, element: int) -> list[int]:
    path = job.run / f"count{element}" / "steps-0"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_a_run_that_was_told_to_stop_is_not_requeued(count: Callable[..., Count]) -> None:
    job = count()
    job.wait_for_step(10)
    (job.run / "STOP").touch()
    job.lab.run(f"scancel --signal=TERM {job.job}")
    assert job.lab.wait_for_job(job.job) == "FAILED", job.text()
    assert job.lab.job(job.job)["Restarts"] == "0" and "/STOP is there" in job.text()


def test_one_task_is_killed(count: Callable[..., Count]) -> None:
    job = count()
    job.wait_for_step(10)
    node = job.lab.job(job.job)["BatchHost"]
    job.lab.run(f"kill -9 $(cat {job.run}/count/.pid-0)", on=node)
    job.assert_complete(restarts=0, here=1)
    assert len(list(job.run.glob("logs/count-*/task-*-restart-1.log"))) == 2
    assert "starts at step 1\n" in job.text() and "restart 1" in job.text()


def test_a_task_whose_manager_is_gone_is_missed(count: Callable[..., Count]) -> None:
    """Slurm itself would leave the job running for ever."""
    job = count(STEPS="60", TRSR_TASK_SECONDS="6")
    job.wait_for_step(5)
    manager = "for p in /proc/[0-9]*; do grep -qsE '^slurmstepd: .*[.]0' $p/cmdline && kill -9 ${p#/proc/}; done; true"
    job.lab.run(manager, on="node2")
    job.lab.run(f"kill -9 $(cat {job.run}/count/.pid-1)", on="node2")
    job.assert_complete(restarts=1, steps=60)
    assert "without a sign of life for 6 s: 1-node2" in job.text()


def test_controller_restarts(count: Callable[..., Count]) -> None:
    job = count()
    job.wait_for_step(5)
    job.lab.stop_daemon("ctl")
    job.wait_for_step(20)
    job.lab.start_daemon("ctl")
    wait_until(lambda: "JobId" in job.lab.run(f"scontrol show job {job.job}", check=False), 60, "controller is back")
    job.assert_complete(restarts=0)


def test_user_error_fails_at_once(count: Callable[..., Count], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "count"
    folder.mkdir(parents=True)
    (folder / "exit-1").touch()
    job = count()
    assert job.lab.wait_for_job(job.job) == "FAILED"
    assert job.lab.job(job.job)["Restarts"] == "0"
    assert "failed with status 1" in job.text()


def test_failure_after_progress_is_tried_again(count: Callable[..., Count]) -> None:
    job = count()
    job.wait_for_step(10)
    fault = job.run / "count" / "exit-1"
    fault.touch()
    wait_until(lambda: "after some progress" in job.text(), 30, "the job sees its failure", job.text)
    fault.unlink()
    job.assert_complete(restarts=1)


def test_crash_loop_is_given_up(count: Callable[..., Count], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "count"
    folder.mkdir(parents=True)
    (folder / "exit-75").touch()
    job = count(TRSR_IDLE_RESTARTS="1")
    assert job.lab.wait_for_job(job.job) == "FAILED", job.text()
    assert job.lab.job(job.job)["Restarts"] == "2"
    assert "given up after 2 restarts" in job.text()


def test_cancelled_job_stays_cancelled(count: Callable[..., Count]) -> None:
    job = count()
    job.wait_for_step(5)
    job.lab.run(f"scancel {job.job}")
    assert job.lab.wait_for_job(job.job) == "CANCELLED"
    job.lab.wait_for_nodes(3)
    assert job.lab.job(job.job)["JobState"] == "CANCELLED", job.text()
