"""A stage in small: every task appends its steps to a separate file, saves nothing else, and stops at SIGTERM.

counter.py FOLDER LAST: counts to LAST, ten steps a second. A file ``exit-STATUS`` in FOLDER makes the tasks leave with
that status.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

EXIT_REQUEUE = 75


def main(folder: Path, last: int) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    rank = os.environ["SLURM_PROCID"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".pid-{rank}").write_text(str(os.getpid()))
    with open(folder / f"steps-{rank}", "a+", buffering=1) as steps:
        steps.seek(0)
        first = len(steps.readlines()) + 1
        print(f"task {rank} starts at step {first}", flush=True)
        for step in range(first, last + 1):
            if stopped:
                print(f"task {rank} stops before step {step}", flush=True)
                return EXIT_REQUEUE
            for file in folder.glob("exit-*"):
                return int(file.name.removeprefix("exit-"))
            steps.write(f"{step}\n")
            time.sleep(0.1)
    (folder / f"done-{rank}").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
