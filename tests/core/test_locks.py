"""Folder locks: the file server's clock alone decides, the dead lose them at once, and what a kill left passes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trsr_dist import liveness, processes
from trsr_dist.errors import RunError
from trsr_dist.files import atomic_folder, sweep
from trsr_dist.liveness import Sign
from trsr_dist.locks import LOCK_STALE_SECONDS, folder_lock
from trsr_dist.processes import host_name, process_start

CLOCK = """
import sys, time
wall, wall_ns, offset = time.time, time.time_ns, int(sys.argv[2])
time.time, time.time_ns = lambda: wall() + offset, lambda: wall_ns() + offset * 10**9
"""
TAKE = (
    CLOCK
    + """
from pathlib import Path
from trsr_dist.errors import RunError
from trsr_dist.locks import folder_lock
try:
    with folder_lock(Path(sys.argv[1])) as lock:
        print("held", flush=True)
        sys.stdin.read()
        lock.check()
except RunError as error:
    print(f"refused: {error}", flush=True)
"""
)


def start(folder: Path, offset_seconds: int) -> subprocess.Popen:
    """A process whose clock is wrong: it takes the lock and holds it until its input ends."""
    command = [sys.executable, "-c", TAKE, str(folder), str(offset_seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def take(folder: Path, offset_seconds: int) -> str:
    return start(folder, offset_seconds).communicate("", timeout=60)[0]


def write_lock(folder: Path, age_seconds: float, **changes: Any) -> Path:
    """The lock of a process on another host, last touched so long ago."""
    record = {"host": "elsewhere", "pid": 7, "started": "1", "job": "", "restart": 0, "task": "t"}
    path = folder.with_name(f".{folder.name}.lock")
    path.write_text(json.dumps(record | changes))
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


@pytest.mark.parametrize("offset", [-600, 600])
def test_a_live_lock_is_safe_from_clocks_that_are_wrong(tmp_path: Path, offset: int) -> None:
    folder = tmp_path / "shards"
    with folder_lock(folder) as lock:
        assert take(folder, offset).startswith(f"refused: {tmp_path}/.shards.lock: held by pid {os.getpid()} on ")
        lock.check()
    holder = start(folder, offset)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"held by pid {holder.pid}"), folder_lock(folder):
        pass
    assert holder.communicate("", timeout=60)[0] == ""


@pytest.mark.parametrize("offset", [-600, 600])
def test_a_dead_lock_passes_on_at_its_term_whatever_the_clocks_say(tmp_path: Path, offset: int) -> None:
    folder = tmp_path / "shards"
    path = write_lock(folder, LOCK_STALE_SECONDS - 15)
    assert take(folder, offset).startswith("refused") and path.exists()
    write_lock(folder, LOCK_STALE_SECONDS + 5)
    assert take(folder, offset) == "held\n" and not path.exists()


def test_the_term_is_two_minutes(tmp_path: Path) -> None:
    """As the documents say: what restarts after a node's death waits for no more, what hangs for less loses nothing."""
    folder = tmp_path / "shards"
    write_lock(folder, 115)
    with pytest.raises(RunError, match="after 120 s of silence"), folder_lock(folder):
        pass
    write_lock(folder, 121)
    with folder_lock(folder) as lock:
        lock.check()


def test_a_stamp_in_the_future_counts_from_now_on(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    path = write_lock(folder, -3600)
    with pytest.raises(RunError, match=r"held by pid 7 on elsewhere \(0 s"), folder_lock(folder):
        pass
    assert path.stat().st_mtime < time.time() + 1
    write_lock(folder, LOCK_STALE_SECONDS + 5)
    with folder_lock(folder) as lock:
        lock.check()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00\x9f", b"[1]", b'{"host": 3, "pid": []}', b"[" * 100_000])
def test_a_lock_that_says_nothing_expires_too(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ".shards.lock"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"held by an unknown process") as caught, folder_lock(tmp_path / "shards"):
        pass
    assert "None" not in str(caught.value)
    os.utime(path, (time.time() - LOCK_STALE_SECONDS - 5,) * 2)
    with folder_lock(tmp_path / "shards") as lock:
        lock.check()


@pytest.mark.parametrize("guard", ["dead process of this host", "empty", "other host"])
def test_a_guard_that_a_killed_process_left_expires(tmp_path: Path, guard: str) -> None:
    folder = tmp_path / "shards"
    write_lock(folder, LOCK_STALE_SECONDS + 5)
    path = tmp_path / ".shards.lock.takeover"
    record = {"host": host_name() if "this" in guard else "elsewhere", "pid": 1, "started": "1"}
    path.write_text("" if guard == "empty" else json.dumps(record))
    if "this" not in guard:
        with pytest.raises(RunError, match="run the command again"), folder_lock(folder):
            pass
        os.utime(path, (time.time() - LOCK_STALE_SECONDS - 5,) * 2)
    with folder_lock(folder) as lock:
        lock.check()
        assert not path.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    subprocess.run(["unshare", "-Urpf", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs namespaces of users and processes",
)
def test_a_live_process_of_another_container_is_not_taken_for_dead(tmp_path: Path) -> None:
    """It has the host's name, and a number that here belongs to another process, or to none."""
    code = TAKE.replace("print", "left = tempfile.mkdtemp(prefix=f'.x.tmp-{signature()}-', dir=sys.argv[3]); print", 1)
    code = f"import tempfile\nfrom trsr_dist.processes import signature\n{code}"
    command = ["unshare", "-Urpf", "--mount-proc", sys.executable, "-c", code, str(tmp_path / "shards"), "0", tmp_path]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="held by pid 1 on "), folder_lock(tmp_path / "shards"):
        pass
    sweep(tmp_path)
    assert len(list(tmp_path.glob(".x.tmp-*"))) == 1
    assert holder.communicate("", timeout=60)[0] == ""


def test_a_live_process_of_another_user_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc is mounted with hidepid: it shows nothing, and only the signal says that there is a process."""
    write_lock(tmp_path / "shards", 5, host=host_name(), pid=os.getppid(), started=process_start(os.getppid()))

    def refuse(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(processes, "process_start", lambda pid: "")
    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(RunError, match=f"held by pid {os.getppid()}"), folder_lock(tmp_path / "shards"):
        pass


LOSER = """
import socket, sys
from pathlib import Path
socket.gethostname = lambda: sys.argv[2]
from trsr_dist.files import atomic_folder
from trsr_dist.locks import folder_lock
folder = Path(sys.argv[1])
with folder_lock(folder) as lock, atomic_folder(folder, lock.check) as inside:
    (inside / "text").write_text("late")
    print(inside, flush=True)
    sys.stdin.read()
    (inside / "more").write_text("late")
"""


@pytest.mark.parametrize("host", ["elsewhere", os.uname().nodename])
def test_who_is_robbed_learns_it_and_publishes_nothing(tmp_path: Path, host: str) -> None:
    """A process was silent for too long, as one that is stopped; its folder goes only where its end cannot be seen."""
    folder, pipes = (
        tmp_path / "merged",
        {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )
    loser = subprocess.Popen([sys.executable, "-c", LOSER, str(folder), host], text=True, **pipes)
    inside = Path(loser.stdout.readline().strip())
    with pytest.raises(RunError, match=f"held by pid {loser.pid} on {host}"), folder_lock(folder):
        pass
    assert (inside / "text").exists(), "who does not hold the lock removes nothing"
    os.utime(tmp_path / ".merged.lock", (time.time() - LOCK_STALE_SECONDS - 5,) * 2)
    with folder_lock(folder) as lock, atomic_folder(folder, lock.check) as target:
        assert (inside / "text").exists() == (host != "elsewhere")
        (target / "text").write_text("new")
        _, errors = loser.communicate("", timeout=60)
        assert loser.returncode == 1 and f"RunError: {tmp_path}/.merged.lock: lost to pid {os.getpid()}" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] and (folder / "text").read_text() == "new"


def test_a_lock_on_a_link_is_that_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "disk" / "shards").mkdir(parents=True)
    (tmp_path / "shards").symlink_to(tmp_path / "disk" / "shards")
    with folder_lock(tmp_path / "disk" / "shards"):
        with pytest.raises(RunError, match=r"disk/\.shards\.lock: held by"), folder_lock(tmp_path / "shards"):
            pass
        with atomic_folder(tmp_path / "shards") as inside:
            (inside / "text").write_text("new")
    assert (tmp_path / "shards").is_symlink() and (tmp_path / "disk" / "shards" / "text").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "shards"]


def test_lock_refuses_a_second_holder_and_survives_a_dead_one(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    with folder_lock(folder):
        with pytest.raises(RunError, match=f"held by pid {os.getpid()}"), folder_lock(folder):
            pass
        assert (tmp_path / ".shards.lock").exists()
    assert not (tmp_path / ".shards.lock").exists()
    holder = {"host": host_name(), "pid": 1, "started": "1"}
    (tmp_path / ".shards.lock").write_text(json.dumps(holder))
    with folder_lock(folder):
        assert json.loads((tmp_path / ".shards.lock").read_text())["pid"] == os.getpid()


def test_requeued_job_takes_the_lock_over_and_the_earlier_start_learns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "merged"
    code = """
import sys
from pathlib import Path
from trsr_dist.files import atomic_folder
from trsr_dist.locks import folder_lock
folder = Path(sys.argv[1])
with folder_lock(folder) as lock, atomic_folder(folder, lock.check) as inside:
    (inside / "text").write_text("old")
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    old = subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes)
    assert old.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="held by"), folder_lock(folder):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with folder_lock(folder) as lock, atomic_folder(folder, lock.check) as inside:
        (inside / "text").write_text("new")
        errors = old.communicate("", timeout=30)[1]
        assert old.returncode == 1 and "lost to" in errors
        lock.check()
    assert (folder / "text").read_text() == "new"


def test_a_disk_that_fails_for_a_moment_loses_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, read = [], liveness._read_sign

    def fail_first(path: Path) -> Sign:
        if failures:
            raise failures.pop()
        return read(path)

    monkeypatch.setattr(liveness, "_read_sign", fail_first)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with folder_lock(tmp_path / "shards") as lock:
        failures += [OSError(errno.EIO, "Input/output error")] * 2
        lock.check()
        assert not failures


RACER = """
import sys
from pathlib import Path
from trsr_dist.errors import RunError
from trsr_dist.locks import folder_lock
print("ready", flush=True)
sys.stdin.readline()
try:
    with folder_lock(Path(sys.argv[1])) as lock:
        print("held", flush=True)
        sys.stdin.readline()
        lock.check()
except RunError:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("leave_guard", [False, True])
def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path, leave_guard: bool) -> None:
    record = json.dumps({"host": host_name(), "pid": 1, "started": "1"})
    for name in [".shards.lock", ".shards.lock.takeover"][: 1 + leave_guard]:
        (tmp_path / name).write_text(record)
    command, pipes = [sys.executable, "-c", RACER, str(tmp_path / "shards")], {"stdin": -1, "stdout": -1, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(6)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 6
    for racer in racers:
        racer.stdin.write("go\n"), racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers]
    rest = [racer.communicate("end\n", timeout=60)[0] for racer in racers]
    assert sorted(said) == ["held"] + ["refused"] * 5 and not any(rest)
    assert [racer.returncode for racer in racers] == [0] * 6 and not list(tmp_path.iterdir())
