"""Ranks must not outlive their launcher: DeepSpeed's runner, when killed, leaves its launcher and the ranks behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from trsr_dist.environment import die_with_parent

LAUNCHER = "deepspeed.launcher.launch"
POLL_SECONDS = 1.0


def follow_launcher() -> None:
    """From now on this process gets SIGTERM when its launcher dies, or the runner that started the launcher."""
    die_with_parent()
    launcher = os.getppid()
    if LAUNCHER in _command(launcher):
        runner = _parent(launcher)
        threading.Thread(target=_watch, args=(launcher, runner), daemon=True).start()


def _watch(launcher: int, runner: int) -> None:
    wait = threading.Event().wait
    while _parent(launcher) == runner:
        wait(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    """Parent of a process; 0 where the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])
