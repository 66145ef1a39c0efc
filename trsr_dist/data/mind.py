"""MIND's files: ``news.tsv`` and ``behaviors.tsv`` (Wu et al., ACL 2020; https://msnews.github.io)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trsr_dist.data.source import LineReader, RawItem, check_columns, shown
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.records import UserLog

NEWS = ("id", "category", "subcategory", "title", "abstract", "url", "title entities", "abstract entities")
BEHAVIORS = ("impression id", "user id", "time", "history", "impressions")
TIME = "%m/%d/%Y %I:%M:%S %p"


@dataclass(frozen=True, slots=True)
class MindReader:
    """News and click histories; a user's first row counts, the others are counted and passed over.

    Args:
        item_file: ``news.tsv``.
        log_file: ``behaviors.tsv``.
        target: ``last``: the last click of the history; ``impression``: the clicked impressions of the row.
        lines: reads the lines.
    """

    item_file: Path
    log_file: Path
    target: str
    lines: LineReader
    default_fields: tuple[str, ...] = NEWS[1:4]
    allowed_fields: tuple[str, ...] = NEWS[1:5]

    def items(self) -> Iterator[RawItem]:
        for row, cells in self._rows(self.item_file, NEWS):
            fields = dict(zip(NEWS[1:5], cells[1:5], strict=True))
            yield RawItem(cells[0].strip(), fields, row, category=cells[1].strip())

    def logs(self) -> Iterator[UserLog]:
        seen: set[int] = set()
        for row, cells in self._rows(self.log_file, BEHAVIORS):
            user = cells[1].strip()
            if not user:
                raise DataError(f"{self.log_file}:{row}: the user id is empty; every row needs one")
            key = hash64(user)
            if key in seen:
                self.lines.counts["further_rows_of_a_user"] += 1
                continue
            seen.add(key)
            yield self._log(user, cells[2], cells[3].split(), cells[4], f"{self.log_file}:{row}")

    def _rows(self, path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
        """Line numbers and cells; empty lines are passed over, and so is a header, which is counted."""
        is_first = True
        for row, line in self.lines.read(path):
            cells = cells_of(line)
            if cells is None:
                continue
            check_columns(path, row, len(cells), columns)
            if is_first and is_header(cells, columns):
                self.lines.counts["header_rows"] += 1
            else:
                yield row, cells
            is_first = False

    def _log(self, user: str, time: str, clicks: list[str], impressions: str, source: str) -> UserLog:
        seconds = _seconds(time, source)
        if self.target == "last":  # impressions are not looked at: those of MIND's test rows carry no labels
            return UserLog(user, tuple(clicks[:-1]), tuple(clicks[-1:]), seconds, (), source)
        clicked, shown = _impressions(impressions.split(), source)
        return UserLog(user, tuple(clicks), clicked, seconds, shown, source)


def cells_of(line: str) -> list[str] | None:
    """The columns of a row; None for an empty line."""
    text = line.rstrip("\r\n")
    return text.split("\t") if text else None


def is_header(cells: list[str], columns: tuple[str, ...]) -> bool:
    """Whether a row holds the names of the columns; MIND's own files have no such row, copies of them may."""
    names = ("".join(filter(str.isalnum, cell)).casefold() for cell in cells)
    wanted = (column.replace(" ", "") for column in columns)
    return sum(name == column for name, column in zip(names, wanted, strict=True)) >= len(columns) / 2


def _impressions(cells: list[str], source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Clicked and not clicked items of ``N1-0 N2-1``."""
    parts: dict[str, list[str]] = {"0": [], "1": []}
    for cell in cells:
        item, _, label = cell.rpartition("-")
        if label not in parts or not item:
            raise DataError(
                f"{source}: impression {shown(cell)} is not of the form ITEM-0 or ITEM-1; repair the row, or set "
                "data.target=last (MIND's test rows carry no labels)"
            )
        parts[label].append(item)
    return tuple(parts["1"]), tuple(parts["0"])


def _seconds(text: str, source: str) -> int:
    try:
        return int(datetime.strptime(text.strip(), TIME).replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise DataError(
            f"{source}: time {shown(text)}, expected such as 11/13/2019 5:53:12 AM; repair the row"
        ) from None
