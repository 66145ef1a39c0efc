"""Amazon-M2's files: ``products_train.csv`` and ``sessions_train.csv`` (Jin et al., KDD Cup 2023)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trsr_dist.data.source import UNIT_ROWS, LineReader, RawItem, in_units
from trsr_dist.data.tables import TableRow, csv_rows
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.records import UserLog

PRODUCT_KEYS = ("id", "locale", "title")
SESSION_KEYS = ("prev_items", "next_item", "locale")
ATTRIBUTES = ("title", "price", "brand", "color", "size", "model", "material", "author", "desc")
QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")


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
    default_fields: tuple[str, ...] = ATTRIBUTES
    allowed_fields: tuple[str, ...] = ATTRIBUTES
    repeats: str = "equal_sessions"

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
