"""Work that any number of tasks share through a folder: pieces, each made once, by whichever task takes it first.

A piece is a folder that is renamed to its name when it is whole, with its facts and counts; the first one counts. A
task at work holds the piece's lease, so that what a killed task was making is made by another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trsr_dist.data.source import Counts
from trsr_dist.errors import DataError
from trsr_dist.files import atomic_folder, read_json, write_json
from trsr_dist.leases import SHORTEST_LOOK_SECONDS, LeaseFolder
from trsr_dist.log import progress

T = TypeVar("T")

FACTS = "facts.json"
HISTORIES = "histories"
"""Lease of those who change what stands beside the pieces."""
ALL = "[!.]*"
"""Phases; what begins with a point is being made."""
MORE_PATIENT = 1.5
"""From one look at what others make to the next."""


class OrderedError(DataError):
    """Bad input that one task would have met after all errors of a lower ``order``."""

    def __init__(self, order: int, message: str) -> None:
        super().__init__(message)
        self.order = order


@dataclass(frozen=True, slots=True)
class SharedWork:
    """The pieces of one job.

    Args:
        folder: takes them; its name holds a hash of settings and inputs.
        leases: of the tasks at work.
        counts: what happens is counted here; what a piece has added is kept with it.
    """

    folder: Path
    leases: LeaseFolder
    counts: Counts

    def path(self, phase: str, number: int = 0) -> Path:
        """Of a piece."""
        return self.folder / f"{phase}-{number:06d}"

    def facts(self, phase: str, number: int = 0) -> dict[str, Any]:
        """What the making of a piece returned."""
        return read_json(self.path(phase, number) / FACTS)["facts"]

    def make(
        self,
        phase: str,
        pieces: Callable[[], Iterable[tuple[int, T]]],
        action: Callable[[T, Path], dict[str, Any] | None],
    ) -> int:
        """Make the pieces that nobody else makes, and wait for the others.

        Args:
            phase: their name.
            pieces: numbers from 0 and what each is made of; called again where another task gives up.
            action: fills a piece's folder and returns its facts. Where input is wrong, what it has written is kept, and
                every task gets the error of the lowest order from ``check``.

        Returns:
            How many pieces there are.
        """
        while True:
            number, missing = -1, []
            with progress(description=phase, unit=" parts") as bar:
                for number, piece in pieces():
                    if not self._is_made(phase, number) and not self._take(phase, number, piece, action):
                        missing.append(number)
                    bar.update()
            if not self._wait(phase, missing):
                return number + 1

    def check(self, *phases: str) -> None:
        """Raise what was wrong first.

        Raises:
            DataError: as one task would have met it.
        """
        errors = [record["error"] for record in self._records(*phases) if record["error"]]
        if errors:
            raise DataError(min(errors)[1])

    def total(self) -> Counts:
        """Counts of all pieces."""
        total = Counts()
        for record in self._records(ALL):
            total.update(record["counts"])
        return total

    def has_failed(self) -> bool:
        """Whether a piece has found the input wrong."""
        return any(record["error"] for record in self._records(ALL))

    def _records(self, *phases: str) -> list[dict[str, Any]]:
        paths = [path for phase in phases for path in sorted(self.folder.glob(f"{phase}-*/{FACTS}"))]
        return [read_json(path) for path in paths]

    def _is_made(self, phase: str, number: int) -> bool:
        return self.path(phase, number).exists()

    def _take(self, phase: str, number: int, piece: T, action: Callable[[T, Path], dict[str, Any] | None]) -> bool:
        """Make a piece; False where another task is at it."""
        lease = self.leases.acquire(f"{phase}-{number}")
        if lease is None:
            return False
        try:
            if not self._is_made(phase, number):
                with atomic_folder(self.path(phase, number), replace=False) as folder:
                    write_json(folder / FACTS, self._record(piece, folder, action), durable=False)
        except OSError:
            if self.leases.is_held(lease):
                raise
        finally:
            self.leases.release(lease)
        return self._is_made(phase, number)

    def _record(self, piece: T, folder: Path, action: Callable[[T, Path], dict[str, Any] | None]) -> dict[str, Any]:
        before, facts, error = self.counts.copy(), None, None
        try:
            facts = action(piece, folder)
        except DataError as found:
            error = [getattr(found, "order", 0), str(found)]
        added = {name: number - before[name] for name, number in self.counts.items()}
        counts = {name: number for name, number in added.items() if number or name not in before}
        return {"facts": facts, "counts": counts, "error": error}

    def _wait(self, phase: str, missing: list[int]) -> bool:
        """Until the pieces are there (False), or one of them is left to whoever takes it (True)."""
        pause = SHORTEST_LOOK_SECONDS / 2
        while missing := [number for number in missing if not self._is_made(phase, number)]:
            for number in missing:
                if (lease := self.leases.acquire(f"{phase}-{number}")) is not None:
                    self.leases.release(lease)
                    if not self._is_made(phase, number):
                        return True
            time.sleep(pause)
            pause = min(MORE_PATIENT * pause, self.leases.look_seconds)
        return False


@contextmanager
def exclusively(leases: LeaseFolder) -> Iterator[None]:
    """One task after the other, where they change what stands beside the pieces."""
    while (lease := leases.acquire(HISTORIES)) is None:
        time.sleep(SHORTEST_LOOK_SECONDS)
    try:
        yield
    finally:
        leases.release(lease)
