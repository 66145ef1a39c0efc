"""The files of published data sets.

MIND        ``news.tsv``, ``behaviors.tsv`` (Wu et al., ACL 2020; https://msnews.github.io)
Amazon-M2   ``products_train.csv``, ``sessions_train.csv`` (Jin et al., KDD Cup 2023)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from trsr_dist.data.source import UNIT_ROWS, LineReader, RawItem, check_columns, in_units, shown
from trsr_dist.data.tables import TableRow, csv_rows
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.records import UserLog

NEWS = ("id", "category", "subcategory", "title", "abstract", "url", "title entities", "abstract entities")
BEHAVIORS = ("impression id", "user id", "time", "history", "impressions")
DATE, CLOCK = "%m/%d/%Y", "%I:%M:%S %p"
USUAL_CLOCK = re.compile("(1[0-2]|[1-9]):([0-5][0-9]):([0-5][0-9]) ([AP]M)")
EPOCH, MIDNIGHT = datetime(1970, 1, 1), datetime(1900, 1, 1)
"""What dates, and times of day alone, are counted from; the latter by ``strptime``'s rule."""

PRODUCT_KEYS = ("id", "locale", "title")
SESSION_KEYS = ("prev_items", "next_item", "locale")
ATTRIBUTES = ("title", "price", "brand", "color", "size", "model", "material", "author", "desc")
QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")


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
    default_fields: ClassVar[tuple[str, ...]] = NEWS[1:4]
    allowed_fields: ClassVar[tuple[str, ...]] = NEWS[1:5]
    repeats: ClassVar[str] = "further_rows_of_a_user"

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
            seconds = mind_seconds(cells[2].strip())
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


def mind_seconds(text: str) -> int:
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


@dataclass(frozen=True, slots=True)
class AmazonReader:
    """Products and sessions. A session has no user id: its key is a hash of its items, and equal sessions count once.

    Args:
        item_file: the products; descriptions may hold line ends.
        log_file: the sessions; ``prev_items`` as numpy prints an array, over several lines.
        locale: only rows of this locale; empty: all, and item ids read ``LOCALE:ID``, since an id may stand in several
            locales with different texts; an item's category is then its locale.
        lines: reads the lines.
    """

    item_file: Path
    log_file: Path
    locale: str
    lines: LineReader
    default_fields: ClassVar[tuple[str, ...]] = ATTRIBUTES
    allowed_fields: ClassVar[tuple[str, ...]] = ATTRIBUTES
    repeats: ClassVar[str] = "equal_sessions"

    def items(self) -> Iterator[RawItem]:
        for row, cells in csv_rows(self.item_file, self.lines, PRODUCT_KEYS):
            if self._is_kept(cells, "products_of_other_locales"):
                fields = {name: cells.get(name, "") for name in ATTRIBUTES}
                category = "" if self.locale else cells["locale"].strip()
                yield RawItem(self._item(cells["id"], cells["locale"].strip()), fields, row, category)

    def units(self) -> Iterator[tuple[int, Iterator[UserLog]]]:
        seen: set[int] = set()
        for number, rows in in_units(csv_rows(self.log_file, self.lines, SESSION_KEYS), UNIT_ROWS):
            yield number, self._logs(rows, seen)

    def _logs(self, rows: Iterator[TableRow], seen: set[int]) -> Iterator[UserLog]:
        for row, cells in rows:
            if not self._is_kept(cells, "sessions_of_other_locales"):
                continue
            locale = cells["locale"].strip()
            items = parse_items(cells["prev_items"], f"{self.log_file}:{row}")
            history = tuple(self._item(item, locale) for item in items)
            target = self._item(cells["next_item"], locale)
            key = hash64(locale, *history, target)
            if key in seen:
                self.lines.counts[self.repeats] += 1
                continue
            seen.add(key)
            yield UserLog(f"{key:016x}", history, (target,) if target else (), 0, (), row)

    def _is_kept(self, cells: dict[str, str], reason: str) -> bool:
        kept = not self.locale or cells["locale"].strip() == self.locale
        if not kept:
            self.lines.counts[reason] += 1
        return kept

    def _item(self, item: str, locale: str) -> str:
        item = item.strip()
        return item if self.locale or not item else f"{locale}:{item}"


def parse_items(text: str, source: str) -> list[str]:
    """Items of ``['A' 'B'\\n 'C']``; commas between them are fine too.

    Raises:
        DataError: it is not such a list, or numpy has shortened it to ``...``.
    """
    inner = text.strip()
    rest = QUOTED.sub("", inner)
    if not (inner.startswith("[") and inner.endswith("]")) or rest.strip("[], \t\r\n"):
        raise DataError(
            f"{source}: prev_items is {inner[:60]!r}, expected such as ['A' 'B'] with every item in quotes and none "
            "left out; repair the row"
        )
    return [single or double for single, double in QUOTED.findall(inner)]
