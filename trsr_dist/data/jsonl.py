"""One's own data: a file of items and one of interactions, as JSON lines, CSV, TSV, Parquet or RecBole's atomic files.

    items.jsonl          {"id": "a", "text": "..."}   or   {"id": "a", "title": "...", "brand": "...", ...}
    interactions.jsonl   {"user": "u", "item": "a", "time": 1700000000}                      one row an interaction
                         {"user": "u", "history": ["a", "b"], "target": "c", "time": ...}    one row a user

Times are Unix seconds (or milliseconds, microseconds, nanoseconds: whatever makes a date of our time) or text. A
user row may name several targets in a list, and ``shown``: items shown with them and not chosen. An item's ``category``
serves category-hard negatives. Blanks around ids do not count. Columns may have other names (``columns``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from trsr_dist.data.interactions import BLOCK_BYTES, BLOCK_ROWS, Interactions, as_id, json_columns
from trsr_dist.data.source import UNIT_ROWS, Counts, LineReader, RawItem, in_units, listed, shown
from trsr_dist.data.tables import is_parquet, is_table, parquet_batches, parquet_units, table_rows
from trsr_dist.data.times import unix_seconds
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.json_text import decode_unique
from trsr_dist.printable import HALVES
from trsr_dist.records import UserLog

INTERACTION, USER = ("user", "item", "time"), ("user", "history", "target")
"""What a row of the one or the other kind has."""
PANDAS_INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
"""Names of columns that hold the row numbers of a table of pandas."""
OWN_NAMES = "name yours with data.columns, such as data.columns={user: customer}"
CONVERT_LITERALS = (
    "python -c 'import ast, json, sys; [print(json.dumps(ast.literal_eval(row))) for row in sys.stdin]' < OLD > NEW"
)


class Place(NamedTuple):
    """Where a record stands; reads ``file:row``."""

    path: Path
    row: int

    def __str__(self) -> str:
        return f"{self.path}:{self.row}"


@dataclass(frozen=True, slots=True)
class Layout:
    """File names, columns and fields of a format, where no setting names others."""

    items: str
    """A ``*`` stands for an ending or a name that is left open."""
    interactions: str
    """Empty: that of the items without ``meta_``."""
    columns: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()


ATOMIC = {"user": "user_id", "item": "item_id", "id": "item_id", "time": "timestamp"}
REVIEWS = {"user": "user_id", "item": "parent_asin", "id": "parent_asin", "time": "timestamp"}
LAYOUTS = {
    "jsonl": Layout("items.jsonl", "interactions.jsonl"),
    "table": Layout("items.*", "interactions.*"),
    "recbole": Layout("*.item*", "*.inter*", ATOMIC),
    "amazon_reviews": Layout(
        "meta_*.jsonl*", "", {**REVIEWS, "category": "main_category"}, ("title", "store", "categories")
    ),
}
"""RecBole: recbole.io/docs/user_guide/data/atomic_files.html. Amazon Reviews 2023: Hou et al., arXiv 2403.03952."""

Row = tuple[dict[str, Any], Place]
Listed = tuple[str, tuple[str, ...], Place]
"""User, item ids and place of a row of candidates."""
Block = tuple[pa.Table | None, int, Iterable[Row]]
"""User, item and time in columns, unless the block is to be read row by row; the number of its first row; its rows."""


@dataclass(frozen=True, slots=True)
class JsonlReader:
    """Items and interactions; of single interactions a user's latest is the target, and exact repeats count once.

    Args:
        item_file: ``items.jsonl``.
        log_file: ``interactions.jsonl``.
        lines: reads the lines.
        chosen_fields: of an item's text; the others are not read. Empty: all.
        time_format: ``data.time_format``.
        default_fields: of an item's text, where none are chosen.
        columns: names in the files of user, item, time, history, target and shown, and of an item's id and category;
            where they are not as in this list.
    """

    item_file: Path
    log_file: Path
    lines: LineReader
    chosen_fields: tuple[str, ...] = ()
    time_format: str = ""
    default_fields: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    allowed_fields: ClassVar[tuple[str, ...]] = ()
    repeats: ClassVar[str] = "further_rows_of_a_user"

    def items(self) -> Iterator[RawItem]:
        id_name, category_name = self._column("id"), self._column("category")
        for record, place in self._records(self.item_file):
            item = _id(record, id_name, place)
            try:
                names = (name for name in self._fields(record) if name != id_name and name in record)
                fields = {name: _text(record[name], name, place) for name in names}
                category = ""
                with suppress(DataError):  # no text: it may be a field that nobody chose
                    category = _text(record.get(category_name), category_name, place)
                yield RawItem(item, fields, place.row, category)
            except RecursionError:
                raise DataError(f"{place}: a list lies too deep within lists; repair the row") from None

    def _fields(self, record: dict[str, Any]) -> Iterable[str]:
        chosen = self.chosen_fields or self.default_fields
        return chosen or (name for name in record if not PANDAS_INDEX.fullmatch(name))

    def units(self) -> Iterator[tuple[int, Iterable[UserLog | Interactions]]]:
        peek = replace(self, lines=replace(self.lines, counts=Counts()))
        first, place = next(peek._records(self.log_file), ({}, None))
        if place is None:
            raise DataError(f"{self.log_file}: holds no record; expected one JSON object a line")
        if self._column("history") in first:
            seen: set[int] = set()
            return ((number, self._user_logs(records, seen)) for number, records in self._record_units())
        if self._column("item") in first:
            return self._grouped_units(first)
        single, whole = (", ".join(map(self._column, names)) for names in (INTERACTION, USER))
        raise DataError(f"{place}: fields {listed(first) or 'none'}; expected {single} or {whole} ({OWN_NAMES})")

    def candidates(self) -> Iterator[tuple[int, Iterator[Listed]]]:
        """Of a file of candidates in place of the log: numbers of its units, as of ``units``, and what each holds."""
        return ((number, self._listed(records)) for number, records in self._record_units())

    def _listed(self, records: Iterable[Row]) -> Iterator[Listed]:
        user_name, list_name, item_name = map(self._column, ("user", "candidates", "item"))
        for record, place in records:
            if list_name in record:
                yield _id(record, user_name, place), _ids(record[list_name], list_name, place), place
            elif item_name in record:
                yield _id(record, user_name, place), (_id(record, item_name, place),), place
            else:
                raise DataError(
                    f"{place}: fields {listed(record) or 'none'}; expected {user_name} and {list_name} (a list), or "
                    f"{user_name} and {item_name} ({OWN_NAMES})"
                )

    def _column(self, role: str) -> str:
        return self.columns.get(role, role)

    def _record_units(self) -> Iterator[tuple[int, Iterator[Row]]]:
        path = self.log_file
        if is_table(path):
            return in_units(self._records(path), UNIT_ROWS)
        return ((number, self._parsed(path, lines)) for number, lines in self.lines.units(path))

    def _user_logs(self, records: Iterator[Row], seen: set[int]) -> Iterator[UserLog]:
        for record, place in records:
            user = _id(record, self._column("user"), place)
            key = hash64(user)
            if key in seen:
                self.lines.counts[self.repeats] += 1
                continue
            seen.add(key)
            try:
                log = self._user_log(user, record, place)
            except DataError as error:
                log = UserLog(user, (), (), row=place.row, problem=str(error))
            yield log

    def _user_log(self, user: str, record: dict[str, Any], place: Place) -> UserLog:
        _, history_name, target_name = map(self._column, USER)
        shown_name, time_name = self._column("shown"), self._column("time")
        target = _field(record, target_name, place)
        targets = _ids(target if isinstance(target, list) else [target], target_name, place)
        history = _ids(_field(record, history_name, place), history_name, place)
        shown, found = _ids(record.get(shown_name, []), shown_name, place), Counts()
        time = self._seconds(record[time_name], place, found) if time_name in record else 0
        return UserLog(user, history, targets, int(time), shown, place.row, counted="".join(found))

    def _grouped_units(self, first: dict[str, Any]) -> Iterator[tuple[int, Iterator[Interactions]]]:
        path, names = self.log_file, tuple(map(self._column, INTERACTION))
        if not is_table(path):
            for number, lines in in_units(self.lines.blocks(path, BLOCK_BYTES), 1):
                blocks = (
                    (json_columns(block, names, first), row, self._parsed(path, self.lines.split(path, row, block)))
                    for row, block in lines
                )
                yield number, self._interactions(blocks, names)
        elif is_parquet(path) and first.keys() >= {*names}:
            for number, (first_row, groups) in enumerate(parquet_units(path)):
                batches = parquet_batches(path, BLOCK_ROWS, names, groups, first_row)
                blocks = ((columns, row, self._rows_of(columns, row)) for row, columns in batches)
                yield number, self._interactions(blocks, names)
        else:
            for number, records in self._record_units():
                yield number, self._interactions([(None, 0, records)], names)

    def _interactions(self, blocks: Iterable[Block], names: tuple[str, ...]) -> Iterator[Interactions]:
        """All of the blocks."""
        found = Interactions()
        for columns, row, records in blocks:
            if columns is None or not found.add_columns(columns, row, self.time_format, self.lines.counts):
                found.add_rows(self._interaction(record, place, *names) for record, place in records)
        yield found

    def _rows_of(self, columns: pa.Table, row: int) -> Iterator[Row]:
        """Made only where somebody asks for one."""
        for at, record in enumerate(columns.to_pylist(), row):
            yield record, Place(self.log_file, at)

    def _interaction(
        self, record: dict[str, Any], place: Place, user_name: str, item_name: str, time_name: str
    ) -> tuple[str, str, float, int]:
        user, item = _id(record, user_name, place), _id(record, item_name, place)
        return user, item, self._seconds(_field(record, time_name, place), place, self.lines.counts), place.row

    def _seconds(self, value: Any, place: Place, counts: Counts) -> float:  # noqa: ANN401 (any JSON value)
        try:
            return unix_seconds(value, self.time_format, counts)
        except (TypeError, ValueError, OverflowError):
            expected = "Unix seconds or ISO 8601; repair the row, or name the form with data.time_format"
            if self.time_format:  # of text, numbers too: 20240131 may be of that form
                number = "" if isinstance(value, str) else " or Unix seconds"
                expected = f"a time as data.time_format={self.time_format!r}{number}; repair the row"
            raise DataError(f"{place}: time {shown(value)}, expected {expected}") from None

    def _records(self, path: Path) -> Iterator[Row]:
        if is_table(path):
            return ((record, Place(path, number)) for number, record in table_rows(path, self.lines))
        return self._parsed(path, self.lines.read(path))

    def _parsed(self, path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
        for number, line in lines:
            if line.strip():
                place = Place(path, number)
                yield self._parse(line, place), place

    def _parse(self, line: str, place: Place) -> dict[str, Any]:
        try:
            record = decode_unique(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: {_what_is_wrong(line, error, place)}") from None
        if not isinstance(record, dict):
            remedy = _DOCUMENT if isinstance(record, list) and place.row == 1 else "repair the row"
            raise DataError(f"{place}: found {type(record).__name__}, expected a JSON object; {remedy}")
        if "\\ud" not in line and "\\uD" not in line:
            return record
        try:
            text = json.dumps(record, ensure_ascii=False)
        except RecursionError:
            raise DataError(f"{place}: a value lies too deep within others; repair the row") from None
        if not HALVES.search(text):  # half of an escaped pair is valid JSON and no text
            return record
        if self.lines.encoding_errors == "fail":
            raise DataError(
                f"{place}: an escape such as \\ud83d stands without its second half and is no character; repair "
                "the row, or set data.encoding_errors=replace"
            )
        self.lines.counts["lines_with_replaced_bytes"] += 1
        return decode_unique(HALVES.sub("?", text))


_DOCUMENT = "this is one JSON document, not one object a line: jq -c '.[]' OLD > NEW makes lines of a list"


def _what_is_wrong(line: str, error: Exception, place: Place) -> str:
    """Of a line that is no JSON; a file of another kind is called by its name."""
    start = line.lstrip()
    if start.startswith(("{'", "{u'")):
        return f"Python literals, not JSON; {CONVERT_LITERALS} converts them"
    if place.row == 1 and (start.startswith("[") or start.rstrip() == "{"):
        return _DOCUMENT
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at character {error.pos}); repair the row"
    if isinstance(error, RecursionError):
        return "not valid JSON (brackets within brackets without end); repair the row"
    return f"not valid JSON ({str(error).partition(';')[0]}); repair the row"


def _field(record: dict[str, Any], name: str, place: Place) -> Any:  # noqa: ANN401 (any JSON value)
    if name not in record:
        raise DataError(f"{place}: no field {name!r}; found {listed(record) or 'none'}; add it, or {OWN_NAMES}")
    return record[name]


def _id(record: dict[str, Any], name: str, place: Place) -> str:
    return _checked_id(_field(record, name, place), name, place)


def _ids(values: Any, name: str, place: Place) -> tuple[str, ...]:  # noqa: ANN401 (any JSON value)
    if not isinstance(values, list):
        raise DataError(f"{place}: {name} is {shown(values)}, expected a list of ids; repair the row")
    return tuple([_checked_id(value, name, place) for value in values])


def _checked_id(value: Any, name: str, place: Place) -> str:  # noqa: ANN401 (any JSON value)
    with suppress(ValueError):
        return as_id(value)
    raise DataError(f"{place}: {name} holds {shown(value)}, expected an id (text or an integer); repair the row")


def _text(value: Any, name: str, place: Place) -> str:  # noqa: ANN401 (any JSON value)
    if value is None or value != value:  # NaN, as pandas writes empty cells
        return ""
    if isinstance(value, list):
        return ", ".join(filter(None, (_text(part, name, place) for part in value)))
    if isinstance(value, dict):
        raise DataError(
            f"{place}: field {name!r} holds an object, expected text, a number or a list; flatten it, or choose other "
            "fields with data.item_fields"
        )
    return str(value)
