"""What the benchmark suites share: a row of the result, a timer, the work of a user's prompts, a table."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from trsr_dist.planner.flops import Workload, triangle

LIBRARIES = ("torch", "peft", "safetensors.torch", "transformers.models.llama.modeling_llama")
LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
HEADER = ("suite", "case", "measure", "value", "unit", "spread", "bound", "share", "note")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number."""

    suite: str
    case: str
    """What was run, with its size."""
    measure: str
    value: float
    """Of repeated measurements the median."""
    unit: str
    note: str = ""
    low: float | None = None
    """Smallest of the repetitions; None: measured once, or counted."""
    high: float | None = None
    bound: float | None = None
    """What counted operations or bytes let expect of ``value``, in its unit; more is better in both."""

    @property
    def share(self) -> float | None:
        """Share of the bound that is reached."""
        return self.value / self.bound if self.bound else None


def rate_row(
    suite: str, case: str, measure: str, work: float, seconds: Sequence[float], unit: str, bound: float | None = None
) -> Row:
    """``work`` a second, from the seconds of each repetition."""
    rates = [work / value for value in seconds]
    return Row(suite, case, measure, median(rates), unit, low=min(rates), high=max(rates), bound=bound)


def ratio_row(
    suite: str, case: str, measure: str, slow: Sequence[float], fast: Sequence[float], bound: float | None = None
) -> Row:
    """How many times as long the one takes as the other, round by round: they took turns."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    return Row(suite, case, measure, median(ratios), "x", low=min(ratios), high=max(ratios), bound=bound)


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


def shared_workload(prefix: int, suffixes: Sequence[int]) -> Workload:
    """One user with the prefix computed once: each suffix attends to the prefix and to itself."""
    pairs = triangle(prefix) + sum(prefix * suffix + triangle(suffix) for suffix in suffixes)
    return Workload(prefix + sum(suffixes), pairs, len(suffixes), 1)


def separate_workload(prefix: int, suffixes: Sequence[int]) -> Workload:
    """The same prompts as sequences of their own."""
    lengths = [prefix + suffix for suffix in suffixes]
    return Workload(sum(lengths), sum(map(triangle, lengths)), len(suffixes), 1)


def as_json(row: Row) -> dict[str, Any]:
    """A row's fields, and the share of its bound; what was not run has null for its value."""
    fields = asdict(row) | {"share": row.share}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()}


def table(rows: Sequence[Row]) -> str:
    """Aligned columns."""
    lines = _lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def json_lines(rows: Sequence[Row]) -> str:
    """One JSON object a line."""
    return "\n".join(json.dumps(as_json(row)) for row in rows)


def markdown(rows: Sequence[Row]) -> str:
    """The same as a markdown table."""
    header, *lines = [f"| {' | '.join(line)} |" for line in _lines(rows)]
    return "\n".join([header, "|---" * len(HEADER) + "|", *lines])


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    return [list(HEADER), *([row.suite, row.case, row.measure, *figures(row), row.note] for row in rows)]


def figures(row: Row) -> list[str]:
    """Value, unit, spread of the repetitions, bound and share, as text."""
    spread = "" if row.low is None else f"{row.low:,.4g} to {row.high:,.4g}"
    bound, share = ("", "") if row.share is None else (f"{row.bound:,.4g}", f"{row.share:.2f}")
    value = "-" if math.isnan(row.value) else f"{row.value:,.4g}"
    return [value, row.unit, spread, bound, share]


def peak_bytes() -> int:
    """The most memory that this program has held so far.

    Not ``ru_maxrss``: on Linux a child inherits that of the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def in_child(function: Callable[..., Any], *args: object) -> Any:
    """Call a module's function in a fresh process, for instance for its peak memory.

    The processes are forked from one that has imported the libraries and done nothing: importing takes longer than most
    of what is measured.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
