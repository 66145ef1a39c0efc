"""Run a function in a forked process that is killed at a chosen change of the disk."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from trsr_dist.errors import RunError
from trsr_dist.run import MANIFEST

KILLED, FAILED = 9, 1
CHANGES = ("os.rename", "shutil.rmtree", "os.remove", "os.rmdir", "os.link", "os.mkdir")


def killed_at_every_change(action: Callable[[], object], paths: str) -> Iterator[str]:
    """Yield once per change that ``action`` makes to such paths, after a process died right before making it.

    Args:
        action: starts from whatever is there at that moment.
        paths: regular expression of whole paths; changes of others do not count. Nor do writes: what is written has no
            name yet.

    Yields:
        What was about to happen.
    """
    number = 0
    while (change := _run(action, re.compile(paths), number)) is not None:
        yield change
        number += 1
    assert number, "nothing was changed"


def check_stage(
    output: Path, old: Callable[[], object], new: Callable[[], object], old_again: Callable[[], object]
) -> None:
    """Kill a stage at every change while it replaces its output by another one, then run it with the first settings.

    It finds its output whole and does nothing, or says that the other one is there; nothing else is left over.

    Args:
        output: of the stage.
        old: the stage; refuses output of other settings.
        new: with other settings and --force.
        old_again: as ``old`` with --force.
    """
    old()
    contents, found = _contents(output), {"old": 0, "new": 0}
    number = (output / MANIFEST).stat().st_ino
    name = re.escape(output.name)
    for change in killed_at_every_change(new, rf"{re.escape(str(output.parent))}/({name}|\.{name}\.(tmp|old)-[^/]*)"):
        try:
            old()
        except RunError:
            assert _contents(output).keys() == contents.keys() and _contents(output) != contents, change
            found["new"] += 1
            old_again()
        else:
            assert (output / MANIFEST).stat().st_ino == number and _contents(output) == contents, change
            found["old"] += 1
        left = list(output.parent.glob(f".{glob.escape(output.name)}*"))
        assert not left, (change, left)
        number = (output / MANIFEST).stat().st_ino
        assert _contents(output) == contents
    assert all(found.values()), found


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _run(action: Callable[[], object], paths: re.Pattern[str], number: int) -> str | None:
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        # torch replaces its pool of threads at its first use after a fork; two threads that do so at once fail
        torch.set_num_threads(torch.get_num_threads())
        _die_at(paths, number, sender)
        try:
            action()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(FAILED)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as stream:
        change = stream.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, KILLED), "the action failed, see its traceback"
    return change if status == KILLED else None


def _die_at(paths: re.Pattern[str], number: int, sender: int) -> None:
    left = number

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event in CHANGES and any(paths.fullmatch(str(path)) for path in args[:2]):
            if not left:
                os.write(sender, f"{event}{args[:2]}".encode())
                os._exit(KILLED)
            left -= 1

    sys.addaudithook(hook)
