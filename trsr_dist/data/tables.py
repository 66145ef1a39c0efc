"""Rows of tables by column name: CSV, TSV, RecBole's atomic files, Parquet. Which one is told by the file's ending."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trsr_dist.data.source import COMPRESSED, PARQUET, UNIT_ROWS, LineReader, check_columns, find_raw, listed, open_raw
from trsr_dist.errors import ConfigError, DataError

MAX_FIELD_CHARACTERS = 1 << 24
JSON_LINES = (".jsonl", ".json", ".ndjson")
ATOMIC = (".inter", ".item")
DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {},
    ".tsv": {"delimiter": "\t"},
    **dict.fromkeys(ATOMIC, {"delimiter": "\t", "quoting": csv.QUOTE_NONE}),
}
ROWS_AT_A_TIME = 4096

TableRow = tuple[int, dict[str, Any]]
"""Line (Parquet: row) from 1, and cells by column."""


def unpacked_name(path: Path) -> str:
    """Without the ending of a compression."""
    return path.stem if path.suffix in COMPRESSED else path.name


def is_table(path: Path) -> bool:
    """Whether the file is read here: any other name is of JSON lines."""
    return _ending(path) in (*DIALECTS, PARQUET)


def is_parquet(path: Path) -> bool:
    return _ending(path) == PARQUET


def _ending(path: Path) -> str:
    return Path(unpacked_name(path)).suffix.lower()


def find_table(folder: Path, pattern: str) -> Path:
    """The one raw file of this name, parts of which may be left open as ``*``.

    Raises:
        ConfigError: several files match; names them.
    """
    if "*" not in pattern:
        return find_raw(folder, pattern)
    matches = sorted(folder / name for name in glob(pattern, root_dir=folder))
    found = [path for path in matches if is_table(path) or _ending(path) in JSON_LINES]
    if len(found) > 1:
        names = listed(path.name for path in found)
        raise ConfigError(
            f"{folder}: {names} may all be meant; name one with data.items_file or data.interactions_file"
        )
    return found[0] if found else folder / pattern


def table_rows(path: Path, lines: LineReader) -> Iterator[TableRow]:
    """Rows of a file that is not JSON lines."""
    if is_parquet(path):
        batches = parquet_batches(path, ROWS_AT_A_TIME)
        return chain.from_iterable(enumerate(batch.to_pylist(), row) for row, batch in batches)
    return csv_rows(path, lines, (), **DIALECTS[_ending(path)])


def csv_rows(path: Path, lines: LineReader, required: tuple[str, ...], **dialect: Any) -> Iterator[TableRow]:
    """Rows of a file with a header.

    Raises:
        DataError: the header lacks a required column or names one twice, or a row is damaged.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    is_tabbed = dialect.get("delimiter") == "\t"
    records = csv.reader((line for _, line in lines.read(path)), strict=True, **dialect)
    try:
        header = tuple(next(records, ()))
        if _ending(path) in ATOMIC:  # a header of RecBole names types too: user_id:token
            header = tuple(name.partition(":")[0] for name in header)
        if missing := [name for name in required if name not in header]:
            raise DataError(
                f"{path}:1: no column {missing[0]!r}; found {listed(header) or 'nothing'}, expected at least "
                f"{', '.join(required)}; give the file its header"
            )
        _check_distinct(f"{path}:1", header)
        row = records.line_num + 1
        for cells in records:
            if cells:
                if is_tabbed and records.line_num > row:
                    raise DataError(
                        f"{path}:{row}: a quotation mark that opens here closes in line {records.line_num}, and no row "
                        "of tabbed values goes over lines; remove or double the mark, or save the table as Parquet"
                    )
                check_columns(path, row, len(cells), header)
                yield row, dict(zip(header, cells, strict=True))
            row = records.line_num + 1
    except csv.Error as error:
        what = f"{error}; is a quotation mark left open before it?"
        if "new-line character" in str(error):
            what = "a carriage return stands outside quotation marks; save the file with line feeds as line ends"
        raise DataError(f"{path}:{records.line_num}: {what}") from None


def _check_distinct(place: str, columns: Sequence[str]) -> None:
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise DataError(f"{place}: column {twice[0]!r} stands twice; remove or rename one of the two")


def parquet_batches(
    path: Path, num_rows: int, names: Sequence[str] | None = None, groups: Sequence[int] | None = None, row: int = 1
) -> Iterator[tuple[int, pa.Table]]:
    """Up to ``num_rows`` rows at a time, and the number of the first, from 1; columns in the order of ``names``.

    Bytes come as text; times to the microsecond, since Python has no finer ones.

    Args:
        path: of the file.
        num_rows: at a time.
        names: of columns; None: all.
        groups: of rows, which are read; None: all.
        row: number of the first row that is read.

    Raises:
        DataError: the file is damaged, or has a column twice.
    """
    with open_raw(path) as stream:
        try:
            file = pq.ParquetFile(stream)
            _check_distinct(str(path), file.schema_arrow.names)
            for batch in file.iter_batches(num_rows, row_groups=groups, columns=names):
                found = pa.Table.from_batches([batch])
                yield row, _plain(found.select(names) if names else found)
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: cannot be read beyond row {row - 1} ({error}); copy or download the file again"
            ) from None


def parquet_units(path: Path) -> list[tuple[int, list[int]]]:
    """Numbers of the first rows, and of the groups, of units of some ``UNIT_ROWS`` rows, or of one group."""
    with open_raw(path) as stream:
        facts = pq.ParquetFile(stream).metadata
        lengths = [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]
    at_once = max(1, UNIT_ROWS * len(lengths) // max(1, sum(lengths)))
    return [
        (1 + sum(lengths[:first]), [*range(first, min(first + at_once, len(lengths)))])
        for first in range(0, len(lengths), at_once)
    ]


def _plain(table: pa.Table) -> pa.Table:
    for place, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            table = table.set_column(place, field.name, table.column(place).cast(pa.large_string()))
        elif pa.types.is_timestamp(kind) and kind.unit == "ns":
            table = table.set_column(
                place, field.name, table.column(place).cast(pa.timestamp("us", kind.tz), safe=False)
            )
    return table
