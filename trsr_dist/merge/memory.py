"""How much memory this process may still take."""

from __future__ import annotations

import resource
from pathlib import Path

from trsr_dist.environment import slurm_memory_bytes

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Limit, use, and the part of the use that the kernel gives back: pages of files that were read."""


def available_bytes() -> int:
    """The smallest of what the machine, each control group, the Slurm job and the address-space limit have left."""
    free = [_meminfo(), *cgroup_rests(CGROUP, OWN_GROUPS.read_text() if OWN_GROUPS.is_file() else "")]
    mapped, resident = (int(word) * resource.getpagesize() for word in Path("/proc/self/statm").read_text().split()[:2])
    given = slurm_memory_bytes()
    if given is not None:
        free.append(given - resident)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - mapped)
    return min(free)


def cgroup_rests(mount: Path, own_groups: str) -> list[int]:
    """What is left under the limits of this process's control groups, from the innermost to the outermost.

    Args:
        mount: where the control groups are mounted; version 1 has a folder ``memory`` there.
        own_groups: content of /proc/self/cgroup.
    """
    rests = []
    for line in own_groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (mount / "memory", VERSION_1) if controllers else (mount, VERSION_2)
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                rests += _rest(group, *names)
    return rests


def _rest(group: Path, limit: str, used: str, given_back: str) -> list[int]:
    """Empty where the group has no limit, or is not seen from inside a container."""
    try:
        text = (group / limit).read_text().strip()
        if not text.isdigit():
            return []
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [int(text) - int((group / used).read_text()) + int(stat.get(given_back, 0))]
    except OSError:
        return []


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
