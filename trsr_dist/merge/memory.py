"""How much memory this process may still take."""

from __future__ import annotations

import resource
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Limit and use, version 2 and version 1."""


def available_bytes() -> int:
    """The smallest of the machine's free memory, the control group's rest, and the address-space limit's rest."""
    free = [_meminfo(), *_cgroup()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        mapped_pages = int(Path("/proc/self/statm").read_text().split()[0])
        free.append(limit - mapped_pages * resource.getpagesize())
    return min(free)


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _cgroup() -> list[int]:
    rests = []
    for limit, used in CGROUP_FILES:
        if (CGROUP / limit).is_file() and (CGROUP / used).is_file():
            text = (CGROUP / limit).read_text().strip()
            if text.isdigit():
                rests.append(int(text) - int((CGROUP / used).read_text()))
    return rests
