"""Disks of their own in memory, small enough to fill up."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FULL = "No space left on device; make room"


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of this size at ``folder``; skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a file system needs root: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, options: str) -> None:
    """Change size or mode of a mounted disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def used_kib(disk: Path) -> int:
    """KiB taken on a disk."""
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize // 1024


def closed_to_others(paths: Iterable[Path]) -> list[Path]:
    """Files that the group or others may read less than they may a file that this process just makes."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "plain")
        plain.touch()
        mode = plain.stat().st_mode & 0o044
    assert mode, "a umask of 077 shows nothing"
    return [path for path in paths if mode & ~path.stat().st_mode]
