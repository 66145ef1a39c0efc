"""What the tests start ends with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import spawn
from trsr_dist.processes import process_start

KILLED = """
import os, sys, time
from multiprocessing import forkserver
from pathlib import Path
from tests import spawn
spawn.LIBRARIES = ()
if __name__ == "__main__":
    script = spawn.Script([sys.argv[1]], Path(os.devnull), Path(os.devnull), dict(os.environ))
    print(script.pid, forkserver._forkserver._forkserver_pid, flush=True)
    time.sleep(300)
"""


def is_alive(pid: int) -> bool:
    """Zombies are not: who adopts them may not look after them."""
    return bool(process_start(pid)) and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_neither_ranks_nor_their_server_outlive_tests_that_are_killed(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text("import time; time.sleep(300)")
    (tmp_path / "killed.py").write_text(KILLED)
    tests = subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "sleep.py")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(spawn.ROOT)},
    )
    pids = [int(pid) for pid in tests.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    tests.kill()
    tests.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
