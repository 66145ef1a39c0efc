"""Runs suites one after the other."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.common import Row

SUITES = (
    "training",
    "scoring",
    "stream",
    "data",
    "prepare",
    "summarize",
    "reduce",
    "merge",
    "planner",
    "trl",
    "serving",
    "gpu",
)
ALL = "all"
ALL_SCALE = 0.5
"""All suites then take about ten minutes on two cores."""


def run_suites(
    asked: str,
    scale: float | None,
    show: Callable[[list[Row]], str],
    options: Mapping[str, Mapping[str, Any]],
) -> None:
    """Print each suite's rows when it has ended, and to standard error how long it took.

    Args:
        asked: a suite, or ``all``.
        scale: multiplies the sizes; None: 1, of all suites ``ALL_SCALE``.
        show: rows as text.
        options: further arguments by suite.
    """
    started = time.monotonic()
    for name in chosen(asked):
        began = time.monotonic()
        run = importlib.import_module(f"benchmarks.{name}").run
        rows = run(scale or (ALL_SCALE if asked == ALL else 1.0), **options.get(name, {}))
        print(show(rows), end="\n\n", flush=True)
        now = time.monotonic()
        print(f"{name}: {now - began:.0f} s, {now - started:.0f} s in all", file=sys.stderr, flush=True)


def chosen(asked: str) -> tuple[str, ...]:
    """The suites to run; of all, the GPU's is left out where there is none."""
    if asked != ALL:
        return (asked,)
    if torch.cuda.is_available():
        return SUITES
    print("gpu: left out, for PyTorch sees no GPU", file=sys.stderr)
    return SUITES[:-1]
