"""What may be wrong with raw files: their rows, their form, their bytes, their names."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import FILES, ODD_VALUES, RAW, change_bytes, change_json, compress, dump, odd_value
from tests.fuzz.sets import Set, encode

HEADER_ROWS = {
    "news.tsv": "news_id\tcategory\tsubcategory\ttitle\tabstract\turl\ttitle_entities\tabstract_entities",
    "behaviors.tsv": "impression_id\tuser_id\ttime\thistory\timpressions",
}


# changes of rows, before anything is written


def change_rows(draw: random.Random, made: Set) -> None:
    """One to three rows differ."""
    name = draw.choice(made.files)
    told = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        rows = made.rows[name]
        if not rows:
            break
        place = draw.randrange(len(rows))
        told.append(f"row {place} {draw.choice(ROW_CHANGES)(draw, name, rows, place)}")
    made.title = f"{name}: {', '.join(told)}"


def _odd_part(draw: random.Random, name: str, rows: list[Any], place: int) -> str:
    row = rows[place]
    if isinstance(row, dict):
        rows[place], what = change_json(draw, row)
        return what
    if isinstance(row, str) or not row:
        rows[place] = ""
        return "emptied"
    column = draw.randrange(len(row))
    value = draw.choice([value for value in ODD_VALUES if isinstance(value, str) and not value.startswith(RAW)])
    rows[place] = [*row[:column], value, *row[column + 1 :]]
    return f"column {column}={value[:30]!r}"


def _copied(draw: random.Random, name: str, rows: list[Any], place: int) -> str:
    rows.insert(draw.randrange(len(rows)) + 1, rows[place])
    return "twice"


def _removed(draw: random.Random, name: str, rows: list[Any], place: int) -> str:
    del rows[place]
    return "removed"


def _mixed(draw: random.Random, name: str, rows: list[Any], place: int) -> str:
    """A part of another row."""
    row, other = rows[place], draw.choice(rows)
    if isinstance(row, dict) and isinstance(other, dict) and row and other:
        key = draw.choice(sorted(other))
        rows[place] = row | {key: other[key]}
        return f"{key} of another row"
    if isinstance(row, list) and isinstance(other, list) and row and other:
        column = draw.randrange(min(len(row), len(other)))
        rows[place] = [*row[:column], other[column], *row[column + 1 :]]
        return f"column {column} of another row"
    return _copied(draw, name, rows, place)


def _wider(draw: random.Random, name: str, rows: list[Any], place: int) -> str:
    row = rows[place]
    if isinstance(row, list):
        rows[place] = draw.choice((row[:-1], [*row, ""], [*row, row[0]], row[:1], []))
        return f"of {len(rows[place])} cells"
    if isinstance(row, dict) and row:
        key = draw.choice(sorted(row))
        twice = draw.choice((row[key], odd_value(draw)))
        rows[place] = f"{dump(row)[:-1]}, {json.dumps(key)}: {dump(twice)}}}"
        return f"with {key!r} twice"
    return "as it was"


def _other_form(draw: random.Random, name: str, rows: list[Any], place: int) -> str:
    row = rows[place]
    if isinstance(row, dict):
        text = draw.choice(
            (repr(row), dump(row)[:-1], dump(row) + dump(row), dump([row]), "{}", "null", "// " + dump(row))
        )
        rows[place] = text
        return f"is {text[:30]!r}"
    if name in HEADER_ROWS:
        rows.insert(0, HEADER_ROWS[name])
        return "after a header"
    if isinstance(row, list) and place:
        rows.insert(place, rows[0])
        return "after the header again"
    if isinstance(row, list) and row:
        rows[0] = [*row[:-1], row[0]]
        return "with a column twice"
    return "as it was"


def _blanks(draw: random.Random, name: str, rows: list[Any], place: int) -> str:
    """Blanks around an id or another text."""
    row, blank = rows[place], draw.choice((" ", "\u00a0", "\u3000", "\u200b"))
    if isinstance(row, dict):
        texts = [key for key, value in row.items() if isinstance(value, str)]
        for key in texts[:1]:
            rows[place] = row | {key: row[key] + blank}
        return f"{texts[:1]} with {blank!r} at its end"
    if isinstance(row, list) and row:
        column = draw.randrange(len(row))
        rows[place] = [*row[:column], row[column] + blank, *row[column + 1 :]]
        return f"column {column} with {blank!r} at its end"
    return "as it was"


def _time(draw: random.Random, name: str, rows: list[Any], place: int) -> str:
    row = rows[place]
    if not isinstance(row, dict) or "time" not in row or not isinstance(row["time"], int):
        return _odd_part(draw, name, rows, place)
    time = row["time"]
    value = draw.choice(
        (time * 1000, time * 10**6, float(time), str(time), f"{time}.0", time / 1000, -time, 0, "2020-09-13T12:26:40Z",
         "2020-09-13 12:26:40 UTC", "Sun Sep 13 04:26:40 -0800 2020", "13/09/2020", "20200913", 2**62, 2**63, "now")
    )  # fmt: skip
    rows[place] = row | {"time": value}
    return f"time {value!r}"


ROW_CHANGES = (_odd_part, _odd_part, _odd_part, _copied, _removed, _mixed, _wider, _other_form, _blanks, _time)


# changes of the form alone


def change_form(draw: random.Random, made: Set, raw: Path) -> None:
    """The same set, written in another way."""
    name = draw.choice(made.files)
    path = raw / name
    data = path.read_bytes()
    forms: dict[str, Callable[[], bytes]] = {
        "with a byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "without its last line end": lambda: data.rstrip(b"\n"),
        "as it is": lambda: data,
    }
    if not name.endswith(".csv"):
        forms["with CR LF"] = lambda: data.replace(b"\n", b"\r\n")
        forms["with empty lines"] = lambda: data.replace(b"\n", b"\n\n") + b"\r\n"
    if name.endswith(".jsonl"):
        rows = made.rows[name]
        lines = lambda write: "".join(write(row) + "\n" for row in rows).encode()  # noqa: E731
        forms["with characters unescaped"] = lambda: lines(partial(json.dumps, ensure_ascii=False))
        forms["with keys in another order"] = lambda: lines(
            lambda row: json.dumps(dict(sorted(row.items(), reverse=True)), ensure_ascii=name[0] == "i")
        )
        forms["without blanks"] = lambda: lines(partial(json.dumps, separators=(",", ":")))
    if name == "interactions.jsonl":
        forms["with a further field"] = lambda: "".join(
            json.dumps(row | {"zzz": {"a": [1]}}) + "\n" for row in made.rows[name]
        ).encode()
        forms["with times as text"] = lambda: "".join(
            json.dumps(row | {"time": str(row["time"])}) + "\n" for row in made.rows[name]
        ).encode()
    if name in ("behaviors.tsv", "interactions.jsonl"):
        shuffled = list(made.rows[name])
        draw.shuffle(shuffled)
        forms["in another order"] = lambda: encode(name, shuffled)
    form = draw.choice(sorted(forms))
    path.write_bytes(forms[form]())
    made.title, made.same = f"{name}: {form}", True


def change_packing(draw: random.Random, made: Set, raw: Path) -> None:
    """Compressed, under its own name or another."""
    name = draw.choice(made.files)
    data, packing = compress(draw, (raw / name).read_bytes())
    (raw / name).write_bytes(data)
    if draw.random() < 0.5:
        (raw / name).rename(raw / f"{name}.{packing}")
        made.title = f"{name}.{packing}"
    else:
        made.title = f"{name}: {packing} under its own name"


def change_file(draw: random.Random, made: Set, raw: Path) -> None:
    """Something else lies under a file's name."""
    name, what = draw.choice(made.files), draw.choice(sorted(FILES))
    FILES[what](raw / name)
    made.title, made.nobody = f"{name}: {what}", what == "unreadable"
    made.names = (name,)


def change_places(draw: random.Random, made: Set, raw: Path) -> None:
    """The folders themselves."""
    folder = raw.parent
    odd = draw.choice(
        (
            "swapped",
            "path a file",
            "path with NUL",
            "path too long",
            "run.dir a file",
            "run.dir with glob",
            "names given",
            "run.dir ~",
        )
    )
    items, log = made.files
    if odd == "swapped":
        (raw / items).rename(raw / "x")
        (raw / log).rename(raw / items)
        (raw / "x").rename(raw / log)
    overrides = {
        "path a file": [f"data.path={raw / items}"],
        "path with NUL": ['data.path="a\\0b"'],
        "path too long": [f"data.path={'x' * 5000}"],
        "run.dir a file": [f"run.dir={raw / items}"],
        "run.dir with glob": [f"run.dir='{folder}/run[v2]*'"],
        "names given": [f"data.items_file={log}"],
        "run.dir ~": [f"run.dir={folder}/~x"],
    }
    made.overrides += overrides.get(odd, [])
    made.title = odd


def change_content(draw: random.Random, made: Set, raw: Path) -> None:
    """Bytes of a file."""
    name = draw.choice(made.files)
    data, what = change_bytes(draw, (raw / name).read_bytes())
    (raw / name).write_bytes(data)
    made.title = f"{name}: {what}"


AFTER = (
    change_content,
    change_content,
    change_content,
    change_form,
    change_form,
    change_packing,
    change_file,
    change_file,
    change_places,
)
