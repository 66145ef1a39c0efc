"""Lines on the terminal, progress bars, metrics.jsonl."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tqdm import tqdm
from typing_extensions import TypedDict

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, plain
from trsr_dist.json_text import parse_json
from trsr_dist.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

METRICS = "metrics.jsonl"
LINE_SECONDS = 30.0
"""Between two lines of progress in a log that is no terminal."""
NOISY_LOGGERS = ("transformers", "peft", "deepspeed", "DeepSpeed", "httpx", "openai", "torch", "torch.distributed")


def get_logger(name: str) -> logging.Logger:
    """A logger below ``trsr``; ``setup_logging`` decides where its lines go."""
    return logging.getLogger(f"trsr.{name}")


def setup_logging(rank: int = 0, stage: str = "") -> None:
    """Rank 0 writes information to standard output; the others only warnings, to standard error."""
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


class MetricRow(TypedDict):
    """What every row of ``metrics.jsonl`` has, beside its scalars."""

    __pydantic_config__ = {"extra": "allow"}
    stage: str
    step: int
    time: float


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


class Sink(Protocol):
    """What takes the same as ``metrics.jsonl``; ``trackers.Background``."""

    def put(self, method: str, *arguments: Any) -> None:
        """Have a method of ``trackers.Tracker`` called."""

    def close(self, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        """Write what is left."""


class MetricLog:
    """Scalars to ``metrics.jsonl`` and the trackers; one writer a stage, on rank 0.

    Args:
        run_dir: the run's folder.
        stage: goes into each row.
        trackers: get the same (``trackers.open_metrics``).
        purge_step: this stage's rows at and above this step are superseded (a resumed run): removed, as torn ones are.
        fence: raises where this process may no longer write (``run.FolderLock.check``).
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        trackers: Sequence[Sink] = (),
        purge_step: int | None = None,
        fence: Callable[[], None] | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._stage = stage
        self._fence = fence
        path = run_dir / METRICS
        if purge_step is not None and path.exists():
            rows = _whole_rows(path.read_text(encoding="utf-8", errors="replace").splitlines())
            kept = [row for row in rows if row["stage"] != stage or row["step"] < purge_step]
            with atomic_file(path) as stream:
                stream.writelines(json.dumps(row) + "\n" for row in kept)
        self._rows = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._trackers = trackers

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append one row; names are TensorBoard's, such as ``train/loss``. Values that are not finite are left out.

        Raises:
            RunError: the fence's.
        """
        if self._fence is not None:
            self._fence()
        scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
        row: dict[str, Any] = {"stage": self._stage, "step": step, "time": round(time.time(), 3), **scalars}
        self._rows.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker.put("scalars", scalars, step)

    def write_figure(self, name: str, figure: Figure, step: int) -> None:
        """Of the trackers only."""
        for tracker in self._trackers:
            tracker.put("figure", name, figure, step)

    def close(self, settings: Mapping[str, Any] | None = None, final: Mapping[str, float] | None = None) -> None:
        """Write the rest; hyperparameters and final metrics go to the trackers."""
        self._rows.close()
        for tracker in self._trackers:
            tracker.close(settings or {}, final or {})


def read_metrics(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Rows of ``metrics.jsonl``; a torn last line (the writer was killed) is passed over."""
    path = run_dir / METRICS
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace", opener=plain) as stream:
            yield from _whole_rows(stream)


def _whole_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(DataError):
            yield parse_json(line, MetricRow)
