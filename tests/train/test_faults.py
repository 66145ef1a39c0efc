"""Kills, hangs, signals, full disks: the run stops fast, says why, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disks import FULL, mounted_disk
from tests.spawn import run_script
from tests.train.jobs import Job, is_alive, wait_until
from tests.train.stuck import STUCK_STEP
from tests.train.world import link_run, losses_of, make_config
from trsr_dist.cli import EXIT_REQUEUE
from trsr_dist.train.checkpoints import CheckpointFolder
from trsr_dist.train.lifecycle import EXIT_STUCK

NUM_STEPS = 48
SAVE_EVERY = 5
TIMEOUT_SECONDS = 8
HANG_SECONDS = 5
HOST = os.uname().nodename
Start = Callable[..., Job]


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    return new_run(tmp_path / "run", source)


@pytest.fixture
def start(run: Path) -> Iterator[Start]:
    jobs = []

    def begin(launcher: str, other: Path | None = None, **options: Any) -> Job:
        jobs.append(Job(other or run, launcher, **options))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


def new_run(run: Path, source: Path, **train: object) -> Path:
    link_run(run, source)
    configure(run, **train)
    return run


def configure(run: Path, **train: object) -> None:
    settings = {"max_steps": NUM_STEPS, "save_every_steps": SAVE_EVERY, "timeout_seconds": TIMEOUT_SECONDS} | train
    make_config(run, train=settings)


def newest_step(run: Path) -> int:
    return CheckpointFolder(run / "checkpoints", 3).newest().state.step


def assert_saved_where_it_stopped(job: Job) -> None:
    assert "interrupted, saved" in job.output and "all is saved, run it again to go on" in job.output
    assert newest_step(job.run) == max(losses_of(job.run)) < NUM_STEPS


@pytest.mark.long
@pytest.mark.timeout(500)
def test_one_run_through_every_fault(source: Path, run: Path, start: Start, tmp_path: Path) -> None:
    """Ten starts of one run; afterwards every step's loss is that of a run that nothing happened to."""
    faults = [
        signal_one_rank,
        signal_one_rank_under_deepspeed,
        kill_the_launcher,
        kill_a_rank,
        stop_a_rank,
        damage_the_newest_checkpoint,
        touch_the_stop_file,
        run_out_of_time,
    ]
    for number, fault in enumerate(faults, 1):
        fault(run, start, number * SAVE_EVERY + 1)
    job = start("alone")
    assert job.end() == 0, job.output
    calm = start("alone", new_run(tmp_path / "calm", source))
    assert calm.end() == 0, calm.output
    losses = losses_of(run)
    assert sorted(losses) == list(range(1, NUM_STEPS + 1))
    assert losses == pytest.approx(losses_of(calm.run), abs=1e-5)


def signal_one_rank(run: Path, start: Start, step: int) -> None:
    job = start("torchrun")
    job.wait_for_step(step)
    os.kill(job.pids()[1], signal.SIGUSR1)
    assert job.end() == 1, "torchrun does not pass on the ranks' own status"
    assert_saved_where_it_stopped(job)


def signal_one_rank_under_deepspeed(run: Path, start: Start, step: int) -> None:
    job = start("deepspeed")
    job.wait_for_step(step)
    os.kill(job.pids()[1], signal.SIGTERM)
    assert job.end() == EXIT_REQUEUE, job.output
    assert_saved_where_it_stopped(job)


def kill_the_launcher(run: Path, start: Start, step: int) -> None:
    """DeepSpeed's runner leaves its ranks behind; they notice, save and stop."""
    job = start("deepspeed")
    job.wait_for_step(step)
    ranks = job.pids()
    job.process.kill()
    job.end()
    wait_until(lambda: not any(map(is_alive, ranks)))
    assert_saved_where_it_stopped(job)


def kill_a_rank(run: Path, start: Start, step: int) -> None:
    job = start("srun")
    job.wait_for_step(step)
    ranks = job.pids()
    os.kill(ranks[1], signal.SIGKILL)
    assert job.end() != 0
    assert "where all ranks were" in job.output
    assert f"rank 1 on {HOST} (pid {ranks[1]})" in job.output


def stop_a_rank(run: Path, start: Start, step: int) -> None:
    """The other rank finds it, however long a collective may take."""
    configure(run, timeout_seconds=600, hang_seconds=HANG_SECONDS)
    job = start("srun")
    job.wait_for_step(step)
    ranks = job.pids()
    os.kill(ranks[1], signal.SIGSTOP)
    wait_until(lambda: not is_alive(ranks[0]), 6 * HANG_SECONDS)
    os.kill(ranks[1], signal.SIGKILL)
    job.end()
    assert job.process.returncodes == [EXIT_STUCK, -signal.SIGKILL], job.output
    assert f"rank 0: stuck: rank 1 on {HOST} (pid {ranks[1]}), in step" in job.output
    configure(run)


def damage_the_newest_checkpoint(run: Path, start: Start, step: int) -> None:
    newest = newest_step(run)
    *_, before, last = sorted((run / "checkpoints").glob("step-*"))
    path = last / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    job = start("alone")
    job.wait_for_step(newest + 1)
    refuse_a_second_training(job)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end() == EXIT_REQUEUE
    assert f"{path}: missing, truncated or changed" in job.output
    assert f"resumed from {before}" in job.output


def refuse_a_second_training(first: Job) -> None:
    os.kill(first.process.pid, signal.SIGSTOP)  # it would finish meanwhile
    second = run_script(*first.process.args)
    os.kill(first.process.pid, signal.SIGCONT)
    assert second.returncode == 1, second.stderr
    assert f"checkpoints.lock: held by pid {first.process.pid}" in second.stderr


def touch_the_stop_file(run: Path, start: Start, step: int) -> None:
    job = start("alone")
    job.wait_for_step(step)
    (run / "STOP").touch()
    assert job.end() == EXIT_REQUEUE
    assert "STOP was touched" in job.output
    assert_saved_where_it_stopped(job)
    again = start("alone")
    assert again.end() == 1 and f"{run}/STOP: the run was told to stop" in again.output
    (run / "STOP").unlink()


def run_out_of_time(run: Path, start: Start, step: int) -> None:
    configure(run, walltime_seconds=0.1)
    job = start("alone")
    assert job.end() == EXIT_REQUEUE
    assert "the job's time is nearly over" in job.output
    configure(run)


@pytest.mark.long
def test_signals_of_one_event_save_once(run: Path, start: Start) -> None:
    """As a scheduler does it: to torchrun, which dies of it, and to the ranks, which the kernel then tells so."""
    job = start("torchrun")
    job.wait_for_step(SAVE_EVERY + 1)
    for pid in (job.process.pid, *(ranks := job.pids())):
        os.kill(pid, signal.SIGUSR1)
    job.end()
    wait_until(lambda: not any(map(is_alive, ranks)))
    assert_saved_where_it_stopped(job)


@pytest.mark.long
def test_a_rank_that_loops_is_named_with_its_calls(run: Path, start: Start) -> None:
    """And not before, while it loads and saves for longer than a step may hang."""
    configure(run, timeout_seconds=600, hang_seconds=HANG_SECONDS, save_every_steps=STUCK_STEP - 2)
    job = start("torchrun", script="tests/train/stuck.py")
    job.wait_for_step(STUCK_STEP - 1)
    since = time.monotonic()
    assert job.end() != 0 and time.monotonic() - since < 60
    assert f"stuck: rank 1 on {HOST}" in job.output and f"in step {STUCK_STEP}, row of " in job.output
    assert re.search(r"the innermost first:\n.*/tests/train/stuck.py:\d+ stuck_row\n", job.output)


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(run: Path, start: Start) -> None:
    with mounted_disk(run / "checkpoints", "192k") as disk:
        job = start("srun")
        assert job.end() != 0
        assert job.output.count(f"error: {run}/checkpoints") == 2 and FULL in job.output, "both ranks say why"
        assert newest_step(run) % SAVE_EVERY == 0
        assert not list(disk.glob(".step-*")), "nothing half-written is left"
