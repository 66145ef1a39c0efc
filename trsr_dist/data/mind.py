"""MIND's files: ``news.tsv`` and ``behaviors.tsv`` (Wu et al., ACL 2020; https://msnews.github.io)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from trsr_dist.data.source import LineReader, RawItem, check_columns, shown
from trsr_dist.errors import DataError
from trsr_dist.records import UserLog

NEWS = ("id", "category", "subcategory", "title", "abstract", "url", "title entities", "abstract entities")
BEHAVIORS = ("impression id", "user id", "time", "history", "impressions")
DATE, CLOCK = "%m/%d/%Y", "%I:%M:%S %p"
USUAL_CLOCK = re.compile("(1[0-2]|[1-9]):([0-5][0-9]):([0-5][0-9]) ([AP]M)")
EPOCH, MIDNIGHT = datetime(1970, 1, 1), datetime(1900, 1, 1)
"""What dates, and times of day alone, are counted from; the latter by ``strptime``'s rule."""


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
    repeats: str = "further_rows_of_a_user"

    def items(self) -> Iterator[RawItem]:
        for row, cells in self._rows(self.item_file, NEWS, self.lines.read(self.item_file)):
            fields = dict(zip(NEWS[1:5], cells[1:5], strict=True))
            yield RawItem(cells[0].strip(), fields, row, category=cells[1].strip())

    def units(self) -> Iterator[tuple[int, Iterator[UserLog]]]:
        seen: set[str] = set()
        for number, lines in self.lines.units(self.log_file):
            yield number, self._logs(self._rows(self.log_file, BEHAVIORS, lines, may_begin=not number), seen)

    def _logs(self, rows: Iterator[tuple[int, list[str]]], seen: set[str]) -> Iterator[UserLog]:
        for row, cells in rows:
            user = cells[1].strip()
            if not user:
                raise DataError(f"{self.log_file}:{row}: the user id is empty; every row needs one")
            if user in seen:
                self.lines.counts[self.repeats] += 1
                continue
            seen.add(user)
            try:
                log = self._log(user, row, cells)
            except DataError as error:
                log = UserLog(user, (), (), row=row, problem=str(error))
            yield log

    def _log(self, user: str, row: int, cells: list[str]) -> UserLog:
        clicks = cells[3].split()
        try:
            seconds = unix_seconds(cells[2].strip())
        except ValueError:
            raise DataError(
                f"{self.log_file}:{row}: time {shown(cells[2])}, expected such as 11/13/2019 5:53:12 AM; repair the row"
            ) from None
        if self.target == "last":  # impressions are not looked at: those of MIND's test rows carry no labels
            return UserLog(user, tuple(clicks[:-1]), tuple(clicks[-1:]), seconds, (), row)
        clicked, others = _impressions(cells[4].split(), f"{self.log_file}:{row}")
        return UserLog(user, tuple(clicks), clicked, seconds, others, row)

    def _rows(
        self, path: Path, columns: tuple[str, ...], lines: Iterable[tuple[int, str]], may_begin: bool = True
    ) -> Iterator[tuple[int, list[str]]]:
        """Line numbers and cells; empty lines are passed over, and so is a header, which is counted.

        MIND's own files have no header, copies of them may, where the lines ``may_begin`` with one.
        """
        names = [column.replace(" ", "") for column in columns]
        is_first = may_begin
        for row, line in lines:
            text = line.rstrip("\r\n")
            if not text:
                continue
            cells = text.split("\t")
            if len(cells) != len(columns):
                check_columns(path, row, len(cells), columns)
            if is_first:
                is_first = False
                pairs = zip(cells, names, strict=True)
                num_equal = sum("".join(filter(str.isalnum, cell)).casefold() == name for cell, name in pairs)
                if num_equal >= len(columns) / 2:
                    self.lines.counts["header_rows"] += 1
                    continue
            yield row, cells


def unix_seconds(text: str) -> int:
    """Unix seconds of one of MIND's times.

    Raises:
        ValueError: it is no such time.
    """
    date, clock = text.split(None, 1)
    return _seconds(date, DATE, EPOCH) + _seconds(clock, CLOCK, MIDNIGHT)


@lru_cache(1 << 17)
def _seconds(text: str, form: str, since: datetime) -> int:
    """Dates and times of day are few: each is parsed once, and without ``strptime`` where MIND's own form is kept."""
    if form == CLOCK and (found := USUAL_CLOCK.fullmatch(text)):
        hour, minute, second, half = found.groups()
        return int(hour) % 12 * 3600 + int(minute) * 60 + int(second) + 43200 * (half == "PM")
    return int((datetime.strptime(text, form) - since).total_seconds())


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
