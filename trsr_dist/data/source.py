"""What every reader of raw data offers, and the reading of lines that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from trsr_dist.errors import DataError
from trsr_dist.records import UserLog

Counts = Counter[str]
"""How often each policy or filter applied; printed and kept in the manifest."""


@dataclass(frozen=True, slots=True)
class RawItem:
    """One row of an item file, before the choice of fields."""

    id: str
    fields: dict[str, str]
    row: int
    """Line in the file, from 1."""
    category: str = ""


class Reader(Protocol):
    """One format of raw files."""

    item_file: Path
    log_file: Path
    default_fields: tuple[str, ...]
    """Fields of an item's text unless data.item_fields names others; empty: all that the item has."""
    allowed_fields: tuple[str, ...]
    """Fields that data.item_fields may name; empty: any."""

    def items(self) -> Iterator[RawItem]: ...

    def logs(self) -> Iterator[UserLog]:
        """One log per user or session, in the file's order."""
        ...


@dataclass(frozen=True, slots=True)
class LineReader:
    """Lines of UTF-8 text, ended by a line feed alone; other line separators stay inside the text."""

    encoding_errors: str
    """``fail`` or ``replace``."""
    counts: Counts

    def read(self, path: Path) -> Iterator[tuple[int, str]]:
        """Line numbers from 1 and lines with their end.

        Raises:
            DataError: the file is missing, or bytes are not UTF-8 and the policy is ``fail``.
        """
        with open_raw(path) as stream:
            for number, line in enumerate(stream, 1):
                yield number, self._decode(line, path, number)

    def _decode(self, line: bytes, path: Path, number: int) -> str:
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            if self.encoding_errors == "fail":
                raise DataError(
                    f"{path}:{number}: byte 0x{line[error.start]:02x} at position {error.start} is not UTF-8; save the "
                    "file as UTF-8, or set data.encoding_errors=replace"
                ) from None
            self.counts["lines_with_replaced_bytes"] += 1
            return line.decode(encoding, errors="replace")


def open_raw(path: Path) -> BinaryIO:
    """Open a raw file for reading bytes.

    Raises:
        DataError: it is missing; names what the folder holds.
    """
    try:
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        there = ", ".join(sorted(p.name for p in path.parent.iterdir())[:8]) if path.parent.is_dir() else "no folder"
        raise DataError(
            f"{path}: missing (found there: {there or 'nothing'}); set data.path, or give the file this name "
            "(data.items_file, data.behaviors_file and data.sessions_file name others)"
        ) from None


def check_columns(path: Path, row: int, found: int, expected: tuple[str, ...]) -> None:
    """Refuse a row of the wrong width.

    Raises:
        DataError: names file, row, both counts and the columns expected.
    """
    if found != len(expected):
        raise DataError(
            f"{path}:{row}: {found} columns, expected {len(expected)} ({', '.join(expected)}); mend or remove the row"
        )
