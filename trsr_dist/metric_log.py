"""Scalars of a run, as rows of ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import TypedDict

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, plain
from trsr_dist.json_text import parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"


class MetricRow(TypedDict):
    """What every row of ``metrics.jsonl`` has, beside its scalars."""

    __pydantic_config__ = {"extra": "allow"}
    stage: str
    step: int
    time: float


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
        fence: raises where this process may no longer write (``locks.FolderLock.check``).
        redone: rows of the step before ``purge_step`` with names that begin so are superseded, too; None: none are.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        trackers: Sequence[Sink] = (),
        purge_step: int | None = None,
        fence: Callable[[], None] | None = None,
        redone: str | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._stage = stage
        self._fence = fence
        self._path = path = run_dir / METRICS
        if purge_step is not None and path.exists():
            rows = _whole_rows(path.read_text(encoding="utf-8", errors="replace").splitlines())
            kept = [row for row in rows if row["stage"] != stage or row["step"] < purge_step]
            if redone is not None:
                again = (stage, purge_step - 1)
                kept = [row for row in kept if (row["stage"], row["step"]) != again or not _has(row, redone)]
            with atomic_file(path) as stream:
                stream.writelines(json.dumps(row) + "\n" for row in kept)
        with open(path, "a", encoding="utf-8") as rows:
            if not _ends_in_line_feed(path):  # else the first row would become part of a torn one
                rows.write("\n")
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
        with open(self._path, "a", encoding="utf-8") as rows:  # a resumed stage may have replaced the file
            rows.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker.put("scalars", scalars, step)

    def write_figure(self, name: str, figure: Figure, step: int) -> None:
        """Of the trackers only."""
        for tracker in self._trackers:
            tracker.put("figure", name, figure, step)

    def close(self, settings: Mapping[str, Any] | None = None, final: Mapping[str, float] | None = None) -> None:
        """Hyperparameters and final metrics go to the trackers, which write the rest."""
        for tracker in self._trackers:
            tracker.close(settings or {}, final or {})


def _has(row: Mapping[str, Any], start: str) -> bool:
    return any(name.startswith(start) for name in row)


def _ends_in_line_feed(path: Path) -> bool:
    with open(path, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        return stream.read() in (b"", b"\n")


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
