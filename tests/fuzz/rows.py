"""The rows of the second reader: items and logs of each raw format, or why a row means nothing."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HEADERS = {
    "id",
    "newsid",
    "news_id",
    "news id",
    "itemid",
    "item_id",
    "item id",
    "nid",
    "impression id",
    "user id",
    "user",
}
NEWS = ("category", "subcategory", "title")
ATTRIBUTES = ("title", "price", "brand", "color", "size", "model", "material", "author", "desc")
PACKED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress}
SCALES = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""Numbers above the first are no seconds but this part of one."""


class RefusedError(Exception):
    """The input has no certain meaning."""


@dataclass(frozen=True)
class Policy:
    """The settings that change what is read."""

    encoding: str = "fail"
    unknown: str = "fail"
    empty: str = "fail"
    repeated: str = "drop"
    min_history: int = 1
    max_history: int = 0
    long: str = "skip"
    target: str = "last"
    locale: str = ""


@dataclass(frozen=True)
class Log:
    user: str
    history: tuple[str, ...]
    targets: tuple[str, ...]
    time: float | None
    ordered: bool = True


def plain(text: str) -> str:
    """Without white space, controls and invisible characters."""
    return "".join(char for char in text if not char.isspace() and unicodedata.category(char) not in ("Cc", "Cf"))


def seconds(value: Any) -> float | None:
    """A time as Unix seconds; None where one may argue.

    Raises:
        RefusedError: no time at all.
    """
    if isinstance(value, bool) or value is None or isinstance(value, list | dict):
        raise RefusedError(f"time {value!r}")
    if isinstance(value, str):
        return _seconds_of_text(value.strip())
    if not math.isfinite(value) or abs(value) >= 2.0**62:
        raise RefusedError(f"time {value!r}")
    for bound, scale in SCALES:
        if abs(value) >= bound:
            return value / scale
    return float(value)


def _seconds_of_text(text: str) -> float | None:
    if re.fullmatch(r"[0-9]{9,19}(\.0*)?", text):
        return seconds(float(text))
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def read_lines(path: Path, encoding: str) -> Iterator[str]:
    """Lines with their ends, packed or not."""
    data = next(other for other in (path, *path.parent.glob(f"{path.name}.*")) if other.is_file()).read_bytes()
    for magic, unpack in PACKED.items():
        data = unpack(data) if data.startswith(magic) else data
    for line in io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")):
        try:
            yield line.decode()
        except UnicodeDecodeError:
            if encoding == "fail":
                raise RefusedError("not UTF-8") from None
            yield line.decode(errors="replace")


def _fields(pairs: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in pairs if plain(value))


def _news(raw: Path, policy: Policy) -> Iterator[tuple[str, str]]:
    for cells in _cells(raw / "news.tsv", 8, policy):
        yield cells[0], _fields(list(zip(NEWS, cells[1:4], strict=True)))


def _cells(path: Path, width: int, policy: Policy) -> Iterator[list[str]]:
    for line in read_lines(path, policy.encoding):
        line = line.rstrip("\r\n")
        if line:
            cells = line.split("\t")
            if len(cells) != width:
                raise RefusedError(f"{len(cells)} columns")
            yield cells


def _behaviors(raw: Path, policy: Policy) -> Iterator[Log]:
    seen = set()
    for cells in _cells(raw / "behaviors.tsv", 5, policy):
        user, clicks = cells[1].strip(), tuple(cells[3].split())
        if not user or user.lower() in HEADERS:
            raise RefusedError(f"user id {user!r}")
        if user in seen:
            continue
        seen.add(user)
        try:
            time = datetime.strptime(cells[2].strip(), "%m/%d/%Y %I:%M:%S %p").replace(tzinfo=UTC).timestamp()
        except ValueError:
            raise RefusedError(f"time {cells[2]!r}") from None
        if policy.target == "last":
            yield Log(user, clicks[:-1], clicks[-1:], time)
        else:
            yield Log(user, clicks, tuple(_clicked(cells[4].split())), time)


def _clicked(shown: list[str]) -> Iterator[str]:
    for cell in shown:
        item, _, label = cell.rpartition("-")
        if not item or label not in ("0", "1"):
            raise RefusedError(f"impression {cell!r}")
        if label == "1":
            yield item


def _table(path: Path, required: tuple[str, ...], policy: Policy) -> Iterator[dict[str, str]]:
    text = "".join(read_lines(path, policy.encoding))
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row] or [[]]
    except csv.Error as error:
        raise RefusedError(str(error)) from None
    if len(set(header)) != len(header) or not set(required) <= set(header):
        raise RefusedError(f"header {header}")
    for row in rows:
        if len(row) != len(header):
            raise RefusedError(f"{len(row)} columns")
        yield dict(zip(header, row, strict=True))


def _name(item: str, locale: str, policy: Policy) -> str:
    return item.strip() if policy.locale or not item.strip() else f"{locale.strip()}:{item.strip()}"


def _products(raw: Path, policy: Policy) -> Iterator[tuple[str, str]]:
    for row in _table(raw / "products_train.csv", ("id", "locale", "title"), policy):
        if not policy.locale or row["locale"].strip() == policy.locale:
            yield _name(row["id"], row["locale"], policy), _fields([(name, row.get(name, "")) for name in ATTRIBUTES])


def _sessions(raw: Path, policy: Policy) -> Iterator[Log]:
    seen = set()
    for row in _table(raw / "sessions_train.csv", ("prev_items", "next_item", "locale"), policy):
        if policy.locale and row["locale"].strip() != policy.locale:
            continue
        quoted = re.compile(r"'([^']*)'|\"([^\"]*)\"")
        inner = row["prev_items"].strip()
        if not re.fullmatch(r"\[[\s,]*\]", quoted.sub("", inner), re.DOTALL):
            raise RefusedError(f"prev_items {inner!r}")
        history = tuple(_name(a or b, row["locale"], policy) for a, b in quoted.findall(inner))
        target = _name(row["next_item"], row["locale"], policy)
        if (history, target) not in seen:
            seen.add((history, target))
            yield Log("", history, (target,) if target else (), 0)


def _records(path: Path, policy: Policy) -> Iterator[dict[str, Any]]:
    for line in read_lines(path, policy.encoding):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise RefusedError(str(error)) from None
        if not isinstance(record, dict):
            raise RefusedError("no object")
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            if policy.encoding == "fail":
                raise RefusedError("half a character") from None
            record = json.loads(json.dumps(record, ensure_ascii=False).encode(errors="replace"))
        yield record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise RefusedError("a key stands twice")
    return dict(pairs)


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RefusedError(f"id {value!r}")
    return str(value).strip()


def _ids(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise RefusedError(f"ids {values!r}")
    return tuple(map(_id, values))


def _value(value: Any) -> str:
    if isinstance(value, dict):
        raise RefusedError("an object as a text")
    if isinstance(value, list):
        return ", ".join(filter(None, map(_value, value)))
    return "" if value is None or value != value else str(value)


def _things(raw: Path, policy: Policy) -> Iterator[tuple[str, str]]:
    for record in _records(raw / "items.jsonl", policy):
        item = _id(record.get("id"))
        text = _value(record.get("text"))
        if plain(text):
            yield item, text
        else:
            yield item, _fields([(name, _value(value)) for name, value in record.items() if name not in ("id", "text")])


def _rows(raw: Path, policy: Policy) -> Iterator[Log]:
    records = list(_records(raw / "interactions.jsonl", policy))
    if not records:
        raise RefusedError("no record")
    yield from _user_rows(records) if "history" in records[0] else _clicks(records)


def _user_rows(records: list[dict[str, Any]]) -> Iterator[Log]:
    seen = set()
    for record in records:
        user = _id(record.get("user"))
        if user in seen:
            continue
        seen.add(user)
        target = record.get("target")
        targets = _ids(target if isinstance(target, list) else [target])
        _ids(record.get("shown", []))
        yield Log(user, _ids(record.get("history")), targets, seconds(record["time"]) if "time" in record else 0)


def _clicks(records: list[dict[str, Any]]) -> Iterator[Log]:
    users: dict[str, dict[tuple[float | None, str], None]] = {}
    for record in records:
        user, item = _id(record.get("user")), _id(record.get("item"))
        if "time" not in record:
            raise RefusedError("no time")
        users.setdefault(user, {})[seconds(record["time"]), item] = None
    for user, clicks in users.items():
        is_certain = all(time is not None for time, _ in clicks)
        order = sorted(clicks, key=lambda click: click[0]) if is_certain else list(clicks)
        items = tuple(item for _, item in order)
        yield Log(user, items[:-1], items[-1:], order[-1][0], is_certain)


READERS = {"mind": (_news, _behaviors), "amazon_m2": (_products, _sessions), "jsonl": (_things, _rows)}
"""Items and logs of each format."""
