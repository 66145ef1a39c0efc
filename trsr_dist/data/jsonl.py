"""One's own data as JSON lines: ``items.jsonl`` and ``interactions.jsonl``.

    items.jsonl          {"id": "a", "text": "..."}   or   {"id": "a", "title": "...", "brand": "...", ...}
    interactions.jsonl   {"user": "u", "item": "a", "time": 1700000000}                      one row an interaction
                         {"user": "u", "history": ["a", "b"], "target": "c", "time": ...}    one row a user

Times are Unix seconds or ISO 8601. A user row may name several targets in a list, and ``shown``: items shown with them
and not chosen. An item's ``category`` serves category-hard negatives.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from trsr_dist.data.source import LineReader, RawItem
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64
from trsr_dist.records import UserLog

NUMBER = re.compile("[0-9]{9,19}")
"""Seconds as text; shorter ones (20240131) are dates."""
MAX_SECONDS = 2.0**62
"""Times are kept as 64-bit whole numbers. NaN and infinity are not below this either."""
Row = tuple[dict[str, Any], str]
"""A record and its ``file:row``."""


@dataclass(frozen=True, slots=True)
class JsonlReader:
    """Items and interactions; of single interactions a user's latest is the target.

    Args:
        item_file: ``items.jsonl``.
        log_file: ``interactions.jsonl``.
        lines: reads the lines.
    """

    item_file: Path
    log_file: Path
    lines: LineReader
    default_fields: tuple[str, ...] = ()
    allowed_fields: tuple[str, ...] = ()

    def items(self) -> Iterator[RawItem]:
        for record, source in self._records(self.item_file):
            item = _id(record, "id", source)
            fields = {name: _text(value, name, source) for name, value in record.items() if name != "id"}
            row = int(source.rpartition(":")[2])
            yield RawItem(item, fields, row, category=fields.get("category", ""))

    def logs(self) -> Iterator[UserLog]:
        records = self._records(self.log_file)
        first = next(records, None)
        if first is None:
            raise DataError(f"{self.log_file}: holds no record; expected one JSON object a line")
        records = chain([first], records)
        if "history" in first[0]:
            return self._user_logs(records)
        if "item" in first[0]:
            return self._grouped_logs(records)
        raise DataError(
            f"{first[1]}: fields {', '.join(first[0]) or 'none'}; expected user, item, time or user, history, target"
        )

    def _user_logs(self, records: Iterator[Row]) -> Iterator[UserLog]:
        seen: set[int] = set()
        for record, source in records:
            user = _id(record, "user", source)
            key = hash64(user)
            if key in seen:
                self.lines.counts["further_rows_of_a_user"] += 1
                continue
            seen.add(key)
            target = _field(record, "target", source)
            targets = _ids(target if isinstance(target, list) else [target], "target", source)
            history = _ids(_field(record, "history", source), "history", source)
            shown = _ids(record.get("shown", []), "shown", source)
            time = _seconds(record["time"], source) if "time" in record else 0
            yield UserLog(user, history, targets, int(time), shown, source)

    def _grouped_logs(self, records: Iterator[Row]) -> Iterator[UserLog]:
        """Columns of numbers are sorted, not objects: about 28 bytes an interaction."""
        users: dict[str, int] = {}
        items: dict[str, int] = {}
        user_codes, item_codes, times, rows = array("q"), array("q"), array("d"), array("q")
        for record, source in records:
            user, item = _id(record, "user", source), _id(record, "item", source)
            user_codes.append(users.setdefault(user, len(users)))
            item_codes.append(items.setdefault(item, len(items)))
            times.append(_seconds(_field(record, "time", source), source))
            rows.append(int(source.rpartition(":")[2]))
        names = list(items)
        codes, seconds = np.frombuffer(user_codes, np.int64), np.frombuffer(times, np.float64)
        order = np.lexsort((seconds, codes))
        starts = np.searchsorted(codes[order], np.arange(len(users) + 1))
        for code, user in enumerate(users):
            mine = order[starts[code] : starts[code + 1]].tolist()
            ids = tuple(names[item_codes[i]] for i in mine)
            source = f"{self.log_file}:{rows[mine[-1]]}"
            yield UserLog(user, ids[:-1], ids[-1:], int(seconds[mine[-1]]), (), source)

    def _records(self, path: Path) -> Iterator[Row]:
        for number, line in self.lines.read(path):
            if line.strip():
                source = f"{path}:{number}"
                yield self._parse(line, source), source

    def _parse(self, line: str, source: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}: not valid JSON ({error.msg} at character {error.pos}); mend the row") from None
        if not isinstance(record, dict):
            raise DataError(f"{source}: found {type(record).__name__}, expected a JSON object; mend the row")
        if "\\ud" in line or "\\uD" in line:
            return self._without_lone_surrogates(record, source)
        return record

    def _without_lone_surrogates(self, record: dict[str, Any], source: str) -> dict[str, Any]:
        """Half of an escaped pair is valid JSON and no text."""
        text = json.dumps(record, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            if self.lines.encoding_errors == "fail":
                raise DataError(
                    f"{source}: an escape such as \\ud83d stands without its second half and is no character; mend the "
                    "row, or set data.encoding_errors=replace"
                ) from None
            self.lines.counts["lines_with_replaced_bytes"] += 1
            return json.loads(text.encode(errors="replace"))
        return record


def _field(record: dict[str, Any], name: str, source: str) -> Any:  # noqa: ANN401 (any JSON value)
    if name not in record:
        raise DataError(f"{source}: no field {name!r}; found {', '.join(record) or 'none'}; add it")
    return record[name]


def _id(record: dict[str, Any], name: str, source: str) -> str:
    return _ids([_field(record, name, source)], name, source)[0]


def _ids(values: Any, name: str, source: str) -> tuple[str, ...]:  # noqa: ANN401 (any JSON value)
    if not isinstance(values, list):
        raise DataError(f"{source}: {name} is {values!r}, expected a list of ids; mend the row")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(f"{source}: {name} holds {value!r}, expected an id (text or an integer); mend the row")
    return tuple(str(value) for value in values)


def _text(value: Any, name: str, source: str) -> str:  # noqa: ANN401 (any JSON value)
    if value is None or value != value:  # NaN, as pandas writes empty cells
        return ""
    if isinstance(value, list):
        return ", ".join(filter(None, (_text(part, name, source) for part in value)))
    if isinstance(value, dict):
        raise DataError(f"{source}: field {name!r} holds an object, expected text, a number or a list; flatten it")
    return str(value)


def _seconds(value: Any, source: str) -> float:  # noqa: ANN401 (any JSON value)
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_SECONDS:
        return float(value)
    try:
        time = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise DataError(f"{source}: time {value!r}, expected Unix seconds or ISO 8601; mend the row") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
