"""tools/prepare_data.py as users run it: status, messages, death and recovery."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.raw import make_config, write_mind
from tests.disks import FULL, mounted_disk, remount

ROOT = Path(__file__).parents[2]


def command(folder: Path, *arguments: str) -> list[str]:
    make_config(folder, "mind")
    settings = [f"run.dir={folder / 'run'}", "train.pool_size=6", "evaluate.negatives_per_positive=5"]
    return [sys.executable, "tools/prepare_data.py", "--config", str(folder / "config.yaml"), *settings, *arguments]


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_one_clear_line_and_status(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    done = call(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert "60 items, users train" in done.stdout
    (raw / "news.tsv").unlink()
    failed = call(tmp_path, "--force")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("room_kib", [4, 12, 32])
def test_a_full_disk_leaves_nothing_that_counts(tmp_path: Path, room_kib: int) -> None:
    write_mind(tmp_path)
    with mounted_disk(tmp_path / "run", f"{room_kib}k") as disk:
        done = call(tmp_path)
        assert done.returncode == 1 and FULL in done.stderr and "Traceback" not in done.stderr
        assert not (disk / "histories").exists()
        remount(disk, "size=64m")
        assert call(tmp_path).returncode == 0


HANGING_JOB = """
import sys, time
from trsr_dist.config import load_config
from trsr_dist.data import build, prepare as job

build.gather = lambda *arguments: time.sleep(60)
job.prepare(load_config(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_job_leaves_nothing_that_counts(tmp_path: Path, kind: signal.Signals) -> None:
    write_mind(tmp_path)
    run = tmp_path / "run"
    _, _, _, config, *settings = command(tmp_path)
    # A shell that runs the tests in the background lets them inherit deafness to SIGINT.
    hearing = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    job = subprocess.Popen(
        [sys.executable, "-c", HANGING_JOB, config, *settings],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        preexec_fn=hearing,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(run.glob(".histories.work/work-*/log-*")):
            assert job.poll() is None
            assert time.monotonic() < deadline, "the job never began"
            time.sleep(0.02)
        deadline = time.monotonic() + 30
        while job.poll() is None and time.monotonic() < deadline:
            job.send_signal(kind)  # again, as a user would: Python forgets one that meets a finalizer
            time.sleep(1)
        assert job.poll() not in (None, 0)
    finally:
        job.kill()
    assert not (run / "histories").exists()
    assert call(tmp_path).returncode == 0
    assert sorted(path.name for path in run.iterdir()) == ["config", "histories"]
