"""A warm process that runs a module's tests against one mutant after the other, each in a separate fork.

It has imported every library that the tests need, and nothing of this project: a fork imports that with the mutant in
the module's place. The tests must run in the process: what they start elsewhere reads the module from disk.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import resource
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

import hypothesis
import pytest

OWN = ("trsr_dist", "tests", "conftest")
MEMORY_BYTES = 4 * 2**30
"""That a fork may take beyond what the nursery has."""
LEAST_SECONDS, FACTOR, WALL_FACTOR = 3, 5, 20
"""Of a fork, the larger of two limits: CPU seconds, and a multiple of what the true module needs. Time by the clock: a
multiple of it, for machines that are shared."""


UNNEEDED = ("cacheprovider", "unraisableexception", "threadexception", "xdist", "timeout")
"""Plugins of pytest that only cost time here."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is mutated and what shall notice."""

    module: str
    """Such as ``trsr_dist.evaluate.metrics``."""
    path: Path
    tests: tuple[str, ...]
    """Arguments of pytest."""
    folder: Path
    """For the tests' temporary files and logs."""


def baseline(target: Target, source: str) -> tuple[float, list[str]]:
    """CPU seconds of the tests with the true module, and the libraries that they load.

    Raises:
        SystemExit: they fail, or never load the module.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    log, modules = target.folder / "baseline.log", target.folder / "modules"
    modules.unlink(missing_ok=True)

    def note() -> None:
        assert target.module in _Mutated.loaded, f"the tests never load {target.module}"
        modules.write_text("\n".join(sys.modules))

    fate, seconds = run(target, source, 600, log, note)
    if fate != "survived" or not modules.exists():
        raise SystemExit(f"{target.module}: the tests fail without a mutant ({fate}):\n{log.read_text()[-4000:]}")
    return seconds, modules.read_text().split()


def warm_up(names: Sequence[str]) -> None:
    """Import libraries, by the names of their modules."""
    for name in names:
        if name.split(".")[0] not in OWN and name not in sys.modules:
            with contextlib.suppress(Exception):  # some modules can be made by their parents only
                importlib.import_module(name)
    forget_project()
    gc.collect()
    gc.freeze()


def forget_project() -> None:
    """Let a fork import the project afresh."""
    for name in [name for name in sys.modules if name.split(".")[0] == OWN[0]]:
        del sys.modules[name]


def run(
    target: Target, source: str, limit_seconds: float, log: Path | None = None, at_end: Callable[[], None] | None = None
) -> tuple[str, float]:
    """Run the tests with this source as the module: ``killed``, ``survived`` or ``timeout``, and CPU seconds."""
    child = os.fork()
    if not child:
        _run_here(target, source, limit_seconds, log, at_end)
    with _pidfd(child) as ended:
        waiting = select.poll()
        waiting.register(ended, select.POLLIN)
        waiting.poll(WALL_FACTOR * limit_seconds * 1000)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and what it started; before it is waited for, its number is its own
    _, status, usage = os.wait4(child, 0)
    shutil.rmtree(target.folder / str(child), ignore_errors=True)
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    return "timeout" if late else "killed" if status else "survived", usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def _pidfd(child: int) -> Iterator[int]:
    descriptor = os.pidfd_open(child)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _run_here(
    target: Target, source: str, limit_seconds: float, log: Path | None, at_end: Callable[[], None] | None
) -> None:
    """In the fork: never returns."""
    code = 99
    try:
        os.setsid()
        _redirect(log or Path(os.devnull))
        _limit(limit_seconds)
        sys.meta_path.insert(0, _Mutated(target, source))
        code = _pytest(target)
        if at_end:
            at_end()
    except BaseException as error:  # whatever a mutant does, it must not run on as another nursery
        code = code or 98
        print(repr(error), flush=True)
    finally:
        os._exit(code)


def _pytest(target: Target) -> int:
    # The same examples for every mutant; a failing one is enough, it need not be small.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    options = ["-q", "--noconftest", "-Wignore", "-otimeout=0", *(f"-pno:{plugin}" for plugin in UNNEEDED)]
    options.append(f"--basetemp={target.folder / str(os.getpid())}")
    return int(pytest.main([*options, *target.tests], plugins=[_FirstFailure()]))


class _FirstFailure:
    """One failure is enough; the rest of the session, and what it would tidy up, costs more than most tests."""

    def pytest_exception_interact(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        print(report.longreprtext, flush=True)
        os._exit(1)


def _redirect(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)


def _limit(seconds: float) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _Mutated:
    """Finder and loader of the one module."""

    loaded: list[str] = []

    def __init__(self, target: Target, source: str) -> None:
        self._target = target
        self._source = source

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name != self._target.module:
            return None
        loader = _Loader(name, str(self._target.path))
        loader.source = self._source
        return importlib.util.spec_from_file_location(name, self._target.path, loader=loader)


class _Loader(SourceFileLoader):
    source = ""

    def get_code(self, fullname: str) -> CodeType:
        _Mutated.loaded.append(fullname)
        return compile(self.source, self.path, "exec", dont_inherit=True)
