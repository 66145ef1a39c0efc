"""What every reader of raw data offers, and the reading of lines that they share."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import reprlib
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar

import pyarrow as pa

from trsr_dist.errors import DataError
from trsr_dist.files import MAX_LINE_BYTES, numbered_lines, plain
from trsr_dist.records import UserLog

if TYPE_CHECKING:  # it imports this module
    from trsr_dist.data.interactions import Interactions

T = TypeVar("T")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
MOST_CHARACTERS = 300
BLOCK_BYTES = 1 << 20
"""Of lines that are decoded at once."""
UNIT_BLOCKS, UNIT_ROWS = 32, 1 << 17
"""Of a log, which one task reads at a time."""
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
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

    repeats: str
    """Name of the count of rows that do not count, since an earlier one of the same user or session does."""

    def items(self) -> Iterator[RawItem]: ...

    def units(self) -> Iterator[tuple[int, Iterable[UserLog | Interactions]]]:
        """Numbers of the log's units, from 0, and what each holds, in the file's order: one log per user or session, or
        the interactions. What the caller passes over is not parsed. A row is left out only where the caller has taken
        an earlier one of its user, so that each user's first row is always there."""
        ...


@dataclass(frozen=True, slots=True)
class LineReader:
    """Lines of UTF-8 text, ended by a line feed alone; other line separators stay inside the text."""

    encoding_errors: str
    """``fail`` or ``replace``."""
    counts: Counts

    def read(self, path: Path) -> Iterator[tuple[int, str]]:
        """Line numbers from 1 and lines with their end; raises as ``blocks``, and DataError where bytes are not UTF-8
        and the policy is ``fail``."""
        for first, block in self.blocks(path, BLOCK_BYTES):
            yield from self.split(path, first, block)

    def split(self, path: Path, first: int, block: bytes) -> Iterator[tuple[int, str]]:
        """The lines of a block, as ``read`` gives them."""
        try:
            text = block.decode("utf-8-sig" if first == 1 else "utf-8")
            yield from enumerate(io.StringIO(text, newline="\n"), first)
        except UnicodeDecodeError:
            for number, line in enumerate(io.BytesIO(block), first):
                yield number, self._decode(line, path, number)

    def blocks(self, path: Path, size: int) -> Iterator[tuple[int, bytes]]:
        """Whole lines, at least ``size`` bytes of them at a time, and the number of the first.

        Raises:
            DataError: the file is missing, unreadable or cut off, or a line has no end.
        """
        first = 1
        with open_raw(path) as stream:
            try:
                while block := stream.read(size):
                    if not block.endswith(b"\n"):
                        block += stream.readline(MAX_LINE_BYTES)
                    if len(block) > MAX_LINE_BYTES:
                        for _ in numbered_lines(io.BytesIO(block), path, first):
                            pass
                    yield first, block
                    first += block.count(b"\n")
            except UNREADABLE as error:
                raise DataError(
                    f"{path}: cannot be read beyond line {_last_line(path)} ({error}); copy or download the file again"
                ) from None

    def units(self, path: Path) -> Iterator[tuple[int, Iterator[tuple[int, str]]]]:
        """Numbers from 0 of some 32 MB each, and their lines as ``read`` gives them."""
        for number, blocks in in_units(self.blocks(path, BLOCK_BYTES), UNIT_BLOCKS):
            yield number, chain.from_iterable(self.split(path, first, block) for first, block in blocks)

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


def in_units(values: Iterator[T], size: int) -> Iterator[tuple[int, Iterator[T]]]:
    """Numbers from 0 and ``size`` values each; the last unit has fewer. What is not taken is passed over."""
    for number in count():
        taken = 0

        def unit() -> Iterator[T]:
            nonlocal taken
            for taken, value in enumerate(islice(values, size), 1):  # noqa: B007
                yield value

        rest = unit()
        yield number, rest
        with suppress(DataError):  # it belongs to whoever makes this unit
            deque(rest, 0)
        if taken < size:
            return


def _last_line(path: Path) -> int:
    """Number of the last line that can be read."""
    number = 0
    with open_raw(path) as stream, suppress(*UNREADABLE):
        for number, _ in numbered_lines(stream, path):  # noqa: B007
            pass
    return number


COMPRESSED: dict[str, tuple[bytes, Callable[[Path], BinaryIO]]] = {
    ".gz": (b"\x1f\x8b", gzip.open),
    ".zst": (b"\x28\xb5\x2f\xfd", lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd"))),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
}
"""By the ending of the name: the first bytes, by which such a file is known under any name, and what opens it."""
PARQUET = ".parquet"
FOREIGN = {
    b"PAR1": "a Parquet file under another name; let it end in .parquet, as data.format=table reads it",
    b"ARROW1": "an Arrow file; write it as JSON lines",
    b"PK\x03\x04": "a ZIP archive (or a spreadsheet); unpack it, or save it as text",
    b"SQLite format 3": "an SQLite database; export its tables as text",
}


def find_raw(folder: Path, name: str) -> Path:
    """The raw file of this name, or where it is missing a compressed one that lies there in its place."""
    path = folder / name
    others = (folder / (name + ending) for ending in COMPRESSED)
    return path if os.path.exists(path) else next((other for other in others if os.path.exists(other)), path)


def open_raw(path: Path) -> BinaryIO:
    """Open a raw file for reading bytes, unpacked where it is compressed.

    Raises:
        DataError: it is missing (names what the folder holds), may not be read, or is no text at all.
    """
    try:
        with open(path, "rb", opener=plain) as stream:
            head = stream.read(16)
        opener = next((opener for magic, opener in COMPRESSED.values() if head.startswith(magic)), None)
        foreign = next((what for magic, what in FOREIGN.items() if head.startswith(magic)), "")
        if foreign and path.suffix.lower() != PARQUET:
            raise DataError(f"{path}: {foreign}")
        return opener(path) if opener else open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        try:
            found = listed(sorted(os.listdir(path.parent))[:8]) or "nothing"
        except OSError:
            found = "no folder that can be read"
        raise DataError(
            f"{path}: missing (found there: {found}); set data.path, or give the file this name "
            "(data.items_file, data.interactions_file, data.behaviors_file and data.sessions_file name others)"
        ) from None
    except PermissionError:
        raise DataError(f"{path}: may not be read; ask its owner for permission to read file and folders") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', error)}); correct data.path") from None


def listed(names: Iterable[str]) -> str:
    """Names of fields or columns for a message: control characters escaped, and not without end."""
    text = ", ".join(name if name.isprintable() else repr(name) for name in names)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def shown(value: object) -> str:
    """A value for a message: as Python writes it, shortened."""
    return _short.repr(value)


def check_columns(path: Path, row: int, found: int, expected: tuple[str, ...]) -> None:
    """Refuse a row of the wrong width.

    Raises:
        DataError: names file, row, both counts and the columns expected.
    """
    if found != len(expected):
        raise DataError(
            f"{path}:{row}: {found} columns, expected {len(expected)} ({', '.join(expected)}); repair or remove the row"
        )
