"""Processes of this and other hosts: which one wrote a file, and whether it has ended.

Names of temporary files end in the signature of their process. Made for NFS: every age is the difference of two of the
file server's stamps, so that no host's clock matters.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from pathlib import Path

from trsr_dist.hashing import digest

FIRST_NAMESPACE = "pid:[4026531836]"
"""Of the processes that a machine starts with: Linux gives it this number."""


def host_name() -> str:
    """Where this process's number means something: the host, or one container of it, whose processes no other sees.

    Containers may all have the host's name, as with the host's network, or where Slurm gives each job a namespace.
    """
    name = socket.gethostname()
    try:
        namespace = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return name
    return name if namespace == FIRST_NAMESPACE else f"{name}+{digest([boot, namespace])[:8]}"


def process_start(pid: int) -> str:
    """Start time of a process of this machine in clock ticks; empty where there is none, or it is hidden."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
    after_name = text.rpartition(")")[2].split()
    is_dead = after_name[0] in "ZX"
    return "" if is_dead else after_name[19]


def has_ended(pid: int, started: str) -> bool:
    """Whether the process of this host that began at ``started`` is gone."""
    if start := process_start(pid):
        return start != started
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's, which /proc may hide (hidepid)
        return False
    except (OSError, OverflowError):
        pass
    return True


def server_time_ns(folder: Path) -> int:
    """Now, by the clock that stamps the folder's files: the stamp of one just touched there."""
    with tempfile.TemporaryFile(dir=folder, prefix=f".clock.tmp-{signature()}-") as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime_ns


def signature() -> str:
    """This process in the name of what it writes."""
    return f"{host_name()}-{os.getpid()}-{process_start(os.getpid())}"


def is_abandoned(path: Path, silent_seconds: float, dead: str = "") -> bool:
    """Whether the process that signed the name of this file or folder has ended.

    Args:
        path: its name ends in a signature and a token.
        silent_seconds: a process of another host counts as dead when it has written nothing for so long.
        dead: signature of a process on another host that is known to be.
    """
    signed = path.name.rpartition("-")[0]
    if found := re.search(rf"\.\w+-{re.escape(host_name())}-(\d+)-(\d+)$", signed):
        return has_ended(int(found[1]), found[2])
    if dead and signed.endswith(f"-{dead}"):
        return True
    try:
        newest = max(file.lstat().st_mtime_ns for file in (path, *path.rglob("*")))
    except FileNotFoundError:  # at work, or gone
        return False
    return server_time_ns(path.parent) - newest > silent_seconds * 1e9
