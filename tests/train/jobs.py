"""Trainings as a user starts them: through deepspeed's launcher, torchrun, or alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.spawn import Script, Scripts, free_port
from tests.train.world import losses_of
from trsr_dist.train.lifecycle import read_heartbeats

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WAIT_SECONDS = 120.0


class Job:
    """A started training and its output."""

    def __init__(self, run: Path, launcher: str, num_ranks: int = 2, script: str = "launch/train.py") -> None:
        self.run = run
        self._before = max(losses_of(run), default=0)
        (run / "heartbeats").mkdir(exist_ok=True)
        for old in (run / "heartbeats").iterdir():
            old.unlink()
        log = run / "job.log"
        self._log = open(log, "a+")  # noqa: SIM115
        command = [script, "--config", str(run / "config.yaml")]
        environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        if launcher == "alone":
            self.process: Script | Scripts | subprocess.Popen = Script(command, log, log, environment)
        elif launcher == "srun":
            self.process = Scripts(command, log, environment, num_ranks)
        else:
            pipes = {"stdout": self._log, "stderr": subprocess.STDOUT}
            command = [*_launch(launcher, num_ranks), *command]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    @property
    def output(self) -> str:
        return (self.run / "job.log").read_text()

    def pids(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        return [beat["pid"] for beat in read_heartbeats(self.run / "heartbeats")]

    def wait_for_step(self, step: int) -> None:
        """Until this step is made, and one by this job."""
        step = max(step, self._before + 1)
        wait_until(lambda: max(losses_of(self.run), default=0) >= step or self.process.poll() is not None)
        assert max(losses_of(self.run), default=0) >= step, self.output

    def end(self) -> int:
        """Exit status."""
        code = self.process.wait(WAIT_SECONDS)
        self._log.close()
        return code

    def kill(self) -> None:
        """End what a failed test left."""
        for pid in [*self.pids(), self.process.pid]:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _launch(launcher: str, num_ranks: int) -> list[str]:
    port = str(free_port())
    if launcher == "deepspeed":
        return [str(BIN / "deepspeed"), "--quiet", "--num_gpus", str(num_ranks), "--master_port", port]
    return [str(BIN / "torchrun"), "--nproc_per_node", str(num_ranks), "--master_port", port]
