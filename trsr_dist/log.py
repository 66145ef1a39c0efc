"""Lines on the terminal and progress bars."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from trsr_dist.printable import printable

T = TypeVar("T")

LINE_SECONDS = 30.0
"""Between two lines of progress in a log that is no terminal."""
NOISY_LOGGERS = ("transformers", "peft", "deepspeed", "DeepSpeed", "httpx", "openai", "torch", "torch.distributed")


def get_logger(name: str) -> logging.Logger:
    """A logger below ``trsr``; ``setup_logging`` decides where its lines go."""
    return logging.getLogger(f"trsr.{name}")


def setup_logging(rank: int = 0, stage: str = "") -> None:
    """Rank 0 writes information to standard output; the others only warnings, to standard error. So what all ranks
    find alike is information, even where it warns: it is told once."""
    logger = logging.getLogger("trsr")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handler = _BarSafeHandler(to_stdout=rank == 0)
    tag = stage if rank == 0 else f"{stage} rank {rank}"
    handler.setFormatter(logging.Formatter(f"[{tag}] %(message)s" if tag else "%(message)s"))
    logger.addHandler(handler)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


class _BarSafeHandler(logging.Handler):
    """Writes above a running progress bar, not through it, to what the standard stream is at that moment."""

    def __init__(self, to_stdout: bool) -> None:
        super().__init__()
        self._to_stdout = to_stdout

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if self._to_stdout else sys.stderr
        tqdm.write(printable(self.format(record), stream.encoding), file=stream)
        stream.flush()


def show(text: str) -> None:
    """Print what a command was asked for; whatever others have written in it steers no terminal."""
    print(printable(text, sys.stdout.encoding), flush=True)


class _LineProgress(tqdm):
    """Counts as a bar does, and writes a line now and then: for logs that are no terminal."""

    monitor_interval = 0  # no thread: processes may fork while one is open

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        state = self.format_dict
        if msg is not None or state["elapsed"] < LINE_SECONDS:
            return  # the bar is being cleared, or has just begun
        done, total, rate = (_quantity(state[key], self.unit) for key in ("n", "total", "rate"))
        left = (state["total"] - state["n"]) / state["rate"] if state["total"] and state["rate"] else 0.0
        parts = [done + (f" of {total}" if total else ""), f"{rate}/s" if rate else ""]
        parts += [f"{tqdm.format_interval(left)} left" if left else "", state["postfix"] or ""]
        get_logger("progress").info("%s: %s", self.desc.removesuffix(": "), ", ".join(filter(None, parts)))


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "B":
        return f"{tqdm.format_sizeof(value, divisor=1000)}B"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def progress(
    items: Iterable[T] | None = None,
    *,
    total: int | None = None,
    description: str,
    unit: str = "it",
    lines: bool = True,
) -> tqdm:
    """A progress bar on a terminal; elsewhere a line in the log every ``LINE_SECONDS``, with rate and time left.

    Args:
        items: are iterated over.
        total: how many; None: their length, where they have one.
        description: stands before the numbers.
        unit: of what is counted; B is shown in kB, MB, GB.
        lines: False where the caller writes its own.
    """
    options = {"total": total, "desc": description, "unit": unit, "leave": False}
    if sys.stderr.isatty():
        return tqdm(items, **options, dynamic_ncols=True)
    quiet = not lines or not get_logger("progress").isEnabledFor(logging.INFO)
    # miniters: otherwise a slow stretch after a fast one goes by without a line.
    return _LineProgress(items, **options, disable=quiet, mininterval=LINE_SECONDS, miniters=1, file=io.StringIO())
