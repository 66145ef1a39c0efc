"""Runs cases in forked children, which bounds what hangs, crashes or takes all memory, and says how each ended."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trsr_dist.cli import EXIT_ERROR, run_command
from trsr_dist.hashing import random_stream

SUCCESS, CLEAR, UNCLEAR, TRACEBACK, HANG, SILENT = (
    "success",
    "clear error",
    "unclear error",
    "traceback",
    "hang",
    "silent",
)
RESULTS = (SUCCESS, CLEAR, UNCLEAR, TRACEBACK, HANG, SILENT)
BAD = RESULTS[2:]
MEMORY_BYTES = 3 << 28
"""What a case may take beyond what the process has at its start: gigabytes for a line of 10 KB are a fault."""
MAX_MESSAGE = 20_000
"""Characters; a longer output hides what it says."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal would obey; the tab and the line feed are harmless."""


@dataclass(frozen=True, slots=True)
class Case:
    """One changed input."""

    title: str
    """What was changed, in words."""
    act: Callable[[], int | None]
    """The real function; a status of 0 or None is success."""
    names: tuple[str, ...]
    """An error must hold one of these: files, keys or rows."""
    judge: Callable[[int, str], str]
    """From status and output to what went wrong in silence; empty where nothing did."""
    must_succeed: bool = False
    """The input is right, so that an error is none that helps."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of cases."""

    name: str
    number: int
    """Cases of a full run."""
    hang_seconds: float
    """A case that takes longer hangs."""
    world: Callable[[Path], Any]
    """What all cases share, made once in a separate folder."""
    make: Callable[[random.Random, Path, Any], Case]
    """A case in its own folder, from a stream of random numbers and the world."""
    per_child: int = 50
    """Cases that one child runs; their threads add up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended."""

    kind: str
    seed: int
    number: int
    title: str
    result: str
    detail: str = ""

    def line(self) -> str:
        """What happened and how to see it again."""
        again = f"python -m tests.fuzz --case {self.kind}:{self.seed}:{self.number}"
        return f"{self.result}: {again}  # {self.title}: {self.detail}"


def run_cases(kind: Kind, seed: int, numbers: Sequence[int], keep: Path | None = None) -> Iterator[Outcome]:
    """Outcomes in order. With ``keep`` the cases' folders lie there and stay."""
    root = Path(tempfile.mkdtemp(prefix="trsr-fuzz-"))
    os.chmod(root, 0o755)  # cases without permissions run as nobody
    try:
        world = kind.world(root / "world")
        done = 0
        while done < len(numbers):
            for outcome in _batch(kind, seed, numbers[done : done + kind.per_child], world, keep or root):
                done += 1
                yield outcome
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _batch(kind: Kind, seed: int, numbers: Sequence[int], world: Any, root: Path) -> Iterator[Outcome]:
    """Outcomes of a child; a case that hangs or kills its child is the batch's last."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(kind, seed, numbers, world, root, writer)
    os.close(writer)
    received, waiting = b"", select.poll()  # select() knows no descriptors above 1023, of which pytest may have many
    waiting.register(reader, select.POLLIN)
    try:
        for number in numbers:
            while b"\n" not in received:
                ready = waiting.poll(kind.hang_seconds * 1000)
                data = os.read(reader, 1 << 16) if ready else b""
                if not data:
                    yield _broken(kind, seed, number, root, is_hang=not ready)
                    return
                received += data
            line, _, received = received.partition(b"\n")
            yield Outcome(**json.loads(line))
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _broken(kind: Kind, seed: int, number: int, root: Path, is_hang: bool) -> Outcome:
    folder = _folder(root, kind, number)
    title = _text(folder / "title")
    threads = _text(folder / "stack").split("\n\n")  # the main one is the last
    stack = [line.strip() for line in threads[-1].splitlines() if "trsr_dist" in line]
    where = stack[0] if stack else "no stack"
    return Outcome(kind.name, seed, number, title, HANG if is_hang else TRACEBACK, where if is_hang else "child died")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _folder(root: Path, kind: Kind, number: int) -> Path:
    return root / f"{kind.name}-{number}"


def _child(kind: Kind, seed: int, numbers: Sequence[int], world: Any, root: Path, writer: int) -> None:
    try:
        memory = resource.getrlimit(resource.RLIMIT_AS)[1]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, memory))
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for number in numbers:
            outcome = _run_one(kind, seed, number, world, root)
            os.write(writer, json.dumps(asdict(outcome)).encode() + b"\n")
    finally:
        os._exit(0)


def _run_one(kind: Kind, seed: int, number: int, world: Any, root: Path) -> Outcome:
    folder = _folder(root, kind, number)
    folder.mkdir(mode=0o777)
    os.chmod(folder, 0o777)
    try:
        case = kind.make(random_stream(seed, kind.name, number), folder, world)
        (folder / "title").write_text(case.title, encoding="utf-8", errors="replace")
        with open(folder / "stack", "w") as stack:
            faulthandler.dump_traceback_later(kind.hang_seconds * 0.9, file=stack)
            result, detail = _outcome(case, folder / "output")
            faulthandler.cancel_dump_traceback_later()
        return Outcome(kind.name, seed, number, _printable(case.title), result, _printable(detail)[:500])
    except Exception:  # the fuzzer's own fault: seen as well
        text = traceback.format_exc(limit=-1)
        return Outcome(kind.name, seed, number, "the fuzzer itself", TRACEBACK, _printable(text))
    finally:
        if root.name.startswith("trsr-fuzz-"):
            shutil.rmtree(folder, ignore_errors=True)


def _outcome(case: Case, output: Path) -> tuple[str, str]:
    status, where = _act(case, output)
    text = _text(output)
    if where:
        return TRACEBACK, where
    fault = case.judge(status, text)
    if fault:
        return SILENT, fault
    control = CONTROL.search(text)
    if control:
        around = text[max(0, control.start() - 60) : control.end() + 20]
        return UNCLEAR, f"control character {control.group()!r} printed raw in {around!r}"
    if len(text) > MAX_MESSAGE:
        return UNCLEAR, f"an output of {len(text)} characters, beginning {text[:200]!r}"
    if status == 0:
        return SUCCESS, ""
    if case.must_succeed:
        return UNCLEAR, f"a right input is refused: {text[text.find('error: ') :][:300]!r}"
    if status != EXIT_ERROR or "error: " not in text:
        return UNCLEAR, f"status {status}, output {text[-300:]!r}"
    if not any(name in text for name in case.names):
        return UNCLEAR, f"none of {case.names} in {text[text.find('error: ') :][:300]!r}"
    return CLEAR, text[text.find("error: ") :][:300]


def _act(case: Case, output: Path) -> tuple[int, str]:
    """Status, and where a traceback came from."""
    with open(output, "wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        run_command(case.act)
    except SystemExit as end:
        return int(end.code or 0), ""
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "trsr_dist" in frame.filename] or frames
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}"
        return 1, f"{type(error).__name__} in {place}: {str(error)[:200]}"
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(UnicodeEncodeError):
                stream.flush()
    return 0, ""


def _printable(text: str) -> str:
    escaped = text.encode("utf-8", "backslashreplace").decode()
    return CONTROL.sub(lambda match: repr(match.group())[1:-1], escaped).replace("\n", "\\n")
