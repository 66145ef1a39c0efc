"""A stage that holds a folder's lock, waits for the file go-RESTART, and publishes: publisher.py FOLDER RESTART."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from trsr_dist.files import atomic_folder
from trsr_dist.locks import folder_lock


def main(folder: Path, restart: str) -> None:
    with folder_lock(folder) as lock, atomic_folder(folder, lock.check) as inside:
        (inside / "restart").write_text(restart)
        folder.with_name(f"held-{restart}").touch()
        while not folder.with_name(f"go-{restart}").exists():
            time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
