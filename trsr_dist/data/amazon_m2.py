"""Amazon-M2's files: ``products_train.csv`` and ``sessions_train.csv`` (Jin et al., KDD Cup 2023)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trsr_dist.data.source import LineReader, RawItem, check_columns, listed
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.records import UserLog

PRODUCT_KEYS = ("id", "locale", "title")
SESSION_KEYS = ("prev_items", "next_item", "locale")
ATTRIBUTES = ("title", "price", "brand", "color", "size", "model", "material", "author", "desc")
MAX_FIELD_CHARACTERS = 1 << 24
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

    def items(self) -> Iterator[RawItem]:
        for row, cells in self._rows(self.item_file, PRODUCT_KEYS):
            if self._is_kept(cells, "products_of_other_locales"):
                fields = {name: cells.get(name, "") for name in ATTRIBUTES}
                category = "" if self.locale else cells["locale"].strip()
                yield RawItem(self._item(cells["id"], cells["locale"].strip()), fields, row, category)

    def logs(self) -> Iterator[UserLog]:
        seen: set[int] = set()
        for row, cells in self._rows(self.log_file, SESSION_KEYS):
            if not self._is_kept(cells, "sessions_of_other_locales"):
                continue
            source, locale = f"{self.log_file}:{row}", cells["locale"].strip()
            history = tuple(self._item(item, locale) for item in parse_items(cells["prev_items"], source))
            target = self._item(cells["next_item"], locale)
            key = hash64(locale, *history, target)
            if key in seen:
                self.lines.counts["equal_sessions"] += 1
                continue
            seen.add(key)
            yield UserLog(f"{key:016x}", history, (target,) if target else (), 0, (), source)

    def _is_kept(self, cells: dict[str, str], reason: str) -> bool:
        kept = not self.locale or cells["locale"].strip() == self.locale
        if not kept:
            self.lines.counts[reason] += 1
        return kept

    def _item(self, item: str, locale: str) -> str:
        item = item.strip()
        return item if self.locale or not item else f"{locale}:{item}"

    def _rows(self, path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
        """Line number at which a record starts, and its cells by column."""
        csv.field_size_limit(MAX_FIELD_CHARACTERS)
        records = csv.reader((line for _, line in self.lines.read(path)), strict=True)
        try:
            header = tuple(next(records, ()))
            if missing := [name for name in required if name not in header]:
                raise DataError(
                    f"{path}:1: no column {missing[0]!r}; found {listed(header) or 'nothing'}, expected at least "
                    f"{', '.join(required)}; give the file its header"
                )
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise DataError(f"{path}:1: column {twice[0]!r} stands twice; remove or rename one of the two")
            row = records.line_num + 1
            for cells in records:
                if cells:
                    check_columns(path, row, len(cells), header)
                    yield row, dict(zip(header, cells, strict=True))
                row = records.line_num + 1
        except csv.Error as error:
            what = f"{error}; is a quotation mark left open before it?"
            if "new-line character" in str(error):
                what = "a carriage return stands outside quotation marks; save the file with line feeds as line ends"
            raise DataError(f"{path}:{records.line_num}: {what}") from None


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
