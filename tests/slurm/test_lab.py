"""The lab itself: several machines, fake GPUs, and nothing left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.lab import Lab

pytestmark = pytest.mark.slurm


def test_tasks_run_on_machines_of_their_own(lab: Lab) -> None:
    output = lab.run(
        "srun -N3 --ntasks-per-node=2 --gpus-per-node=2 bash -c 'echo $(hostname) $(hostname -i) $CUDA_VISIBLE_DEVICES'"
    )
    lines = [line for line in output.splitlines() if line.startswith("node")]
    assert sorted(lines) == sorted(f"node{n} 10.77.0.{10 + n} 0,1" for n in (1, 2, 3) for _ in range(2))


def test_nothing_is_left_of_a_lab() -> None:
    before = set(subprocess.check_output(["ip", "-o", "link"], text=True).splitlines())
    with Lab(nodes=1) as second:
        folder = second.folder
        assert second.run("srun hostname").strip() == "node1"
    assert not folder.exists()
    assert set(subprocess.check_output(["ip", "-o", "link"], text=True).splitlines()) == before
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in commands if str(folder).encode() in line]
