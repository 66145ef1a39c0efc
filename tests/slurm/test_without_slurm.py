"""Two hosts with plain torchrun: a host dies, and the same command goes on. The lab gives hosts and network alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, wait_until
from tests.train.world import losses_of, make_config, make_run, plain_losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
NUM_STEPS = 40


def start(lab: Lab, run: Path, rank: int) -> Path:
    """Begin the training on one of the two hosts; the file that will hold its exit status."""
    host, status = lab.nodes[rank], run / f"status-{rank}"
    status.unlink(missing_ok=True)
    nodes = f"--nnodes 2 --nproc_per_node 1 --node_rank {rank} --master_addr {lab.nodes[0]} --master_port 29533"
    command = f"torchrun {nodes} launch/train.py --config {run}/config.yaml >> {run}/out-{rank} 2>&1"
    lab.run(f"setsid bash -c '{command}; echo $? > {status}' > /dev/null 2>&1 < /dev/null &", on=host)
    return status


def text(run: Path) -> str:
    return "".join(path.read_text() for path in sorted(run.glob("out-*")))


def wait_for_end(status: Path, run: Path) -> int:
    wait_until(lambda: status.exists() and status.read_text() != "", 240, "the end", lambda: text(run))
    return int(status.read_text())


def test_a_host_dies_and_the_same_command_goes_on(lab: Lab, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    train = {"max_steps": NUM_STEPS, "save_every_steps": 5, "timeout_seconds": 20, "num_workers": 0}
    config = make_config(run, train=train)
    statuses = [start(lab, run, rank) for rank in range(2)]
    wait_until(lambda: max(losses_of(run), default=0) >= 12, 200, "step 12", lambda: text(run))
    lab.power_off(lab.nodes[1])
    try:
        began = time.monotonic()
        assert wait_for_end(statuses[0], run) != 0, "the other host must notice"
        assert time.monotonic() - began < 120
    finally:
        lab.boot(lab.nodes[1])
    statuses = [start(lab, run, rank) for rank in range(2)]
    assert [wait_for_end(status, run) for status in statuses] == [0, 0], text(run)
    losses = losses_of(run)
    assert sorted(losses) == list(range(1, NUM_STEPS + 1))
    assert [losses[step] for step in sorted(losses)] == pytest.approx(plain_losses(config, NUM_STEPS), abs=1e-5)
