"""What the benchmark suites share: a row of the result, a timer, a table."""

from __future__ import annotations

import importlib
import pkgutil
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trsr_dist.benchmarks


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number."""

    suite: str
    case: str
    """What was run, with its size."""
    measure: str
    value: float
    unit: str
    note: str = ""


@dataclass(slots=True)
class Timer:
    """Seconds of a block."""

    wall: float = 0.0
    cpu: float = 0.0
    """Of all threads of this process and of its children that have ended: comparable on a loaded machine."""


@contextmanager
def timed() -> Iterator[Timer]:
    """Measure a block; the timer's fields are set when it ends."""
    timer = Timer()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield timer
    timer.wall, timer.cpu = time.perf_counter() - wall, _cpu_seconds() - cpu


def suites() -> list[str]:
    """Names of the suites."""
    found = [module.name for module in pkgutil.iter_modules(trsr_dist.benchmarks.__path__)]
    return sorted(name for name in found if name not in ("common", "report"))


def load_suite(name: str) -> Callable[[float], list[Row]]:
    """The ``run`` of a suite; its argument multiplies the suite's sizes."""
    return importlib.import_module(f"trsr_dist.benchmarks.{name}").run


def table(rows: Sequence[Row]) -> str:
    """Aligned columns."""
    lines = [["suite", "case", "measure", "value", "unit", "note"]]
    lines += [[row.suite, row.case, row.measure, f"{row.value:,.4g}", row.unit, row.note] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
