"""From raw items to the catalogue's texts: choice of fields, white space, duplicates, items without text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from trsr_dist.data.source import Counts, RawItem, shown
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.prompts.text import one_line
from trsr_dist.records import Item
from trsr_dist.words import has_text

REMOVED = -1
"""Row of an item that data.empty_items left out."""
UNKNOWN = -2
"""Row of an id that the catalogue lacks."""


def item_text(fields: dict[str, str], chosen: Sequence[str], counts: Counts) -> str:
    """``field: value`` pairs joined by ``; ``, without empty ones; names and values in one line.

    A field named ``text`` stands without its name, and alone where no fields are chosen.
    White space, line ends and control characters become single blanks; texts that this changed are counted.
    """
    parts = []
    changed = False
    for name in chosen or (["text"] if fields.get("text", "").strip() else fields):
        value = fields.get(name, "")
        clean = one_line(value)
        changed |= clean != value
        if has_text(clean):
            parts.append(clean if name == "text" else f"{one_line(name)}: {clean}")
    counts["items_with_normalized_white_space"] += changed
    return "; ".join(parts)


class CatalogueRules:
    """Turns raw items into items, one row each, and remembers which id has which row.

    Args:
        path: the item file, for messages.
        chosen: fields of the text, in order; empty: all.
        empty_items: ``fail`` or ``skip``.
        duplicate_items: ``fail`` or ``first``.
        counts: what happened.
    """

    def __init__(
        self, path: Path, chosen: Sequence[str], empty_items: str, duplicate_items: str, counts: Counts
    ) -> None:
        self.rows: dict[str, int] = {}
        """Row of each id; ``REMOVED`` for an item left out for want of text."""
        self._path, self._chosen, self._empty_items, self._counts = path, chosen, empty_items, counts
        self._duplicate_items = duplicate_items
        self._texts = array("Q")
        self._lines = array("Q")

    def admit(self, items: Iterable[RawItem]) -> Iterator[Item]:
        """Items of the catalogue, in row order.

        Raises:
            DataError: an id is empty, stands twice with different texts, or has no text and the policy is ``fail``;
                or no item has a chosen field, or there is none.
        """
        absent = set(self._chosen)
        for raw in items:
            if absent:
                absent -= raw.fields.keys()
            self._counts["items_read"] += 1
            if not raw.id:
                raise DataError(f"{self._path}:{raw.row}: the item id is empty; every item needs one")
            text = item_text(raw.fields, self._chosen, self._counts)
            if raw.id in self.rows:
                self._check_equal(raw, text)
            elif not text:
                if self._empty_items == "fail":
                    raise DataError(
                        f"{self._path}:{raw.row}: item {shown(raw.id)} has no text in "
                        f"{', '.join(self._chosen) or 'any field'}; fill a field, choose others with "
                        "data.item_fields, or set data.empty_items=skip"
                    )
                self._counts["items_without_text"] += 1
                self.rows[raw.id] = REMOVED
            else:
                self.rows[raw.id] = len(self._texts)
                self._texts.append(hash64(text))
                self._lines.append(raw.row)
                yield Item(raw.id, text, " ".join(raw.category.split()))
        if not self._counts["items_read"]:
            raise DataError(f"{self._path}: holds no item; expected one a line")
        if absent:
            raise DataError(f"{self._path}: no item has the field {min(absent)!r}; correct data.item_fields")

    def _check_equal(self, raw: RawItem, text: str) -> None:
        row = self.rows[raw.id]
        if row == REMOVED and not text or row != REMOVED and self._texts[row] == hash64(text):
            self._counts["repeated_items"] += 1
            return
        if self._duplicate_items == "first":
            self._counts["further_texts_of_an_item"] += 1
            return
        first = f"line {self._lines[row]}" if row != REMOVED else "an earlier line, without text"
        raise DataError(
            f"{self._path}:{raw.row}: item {shown(raw.id)} stands here with another text than in {first}; "
            f"keep one of the two, or set data.duplicate_items=first (here: {shown(text)})"
        )
