"""Raw files of every format, changed in their rows, bytes, values, form or place, through the preparation job.

Oracle: ``reference.meaning``, a second reader. Where it refuses the files, success must come with a count of what was
left out; where it reads them, users, histories, targets, times and texts must be equal, negatives must be none of the
user's own items, and what was lost must be counted. Changes of form alone (``same``) must succeed. An error must leave
no histories, and one for a file that is nothing at all must name that file.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import FILES, ODD_VALUES, RAW, as_nobody, change_bytes, change_json, compress, dump, odd_value
from tests.fuzz.reference import SCALES, Meaning, Policy, Refused, User, meaning, plain
from tests.fuzz.running import Case, Kind
from trsr_dist.config import load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.data.splits import SPLITS
from trsr_dist.data.store import HistoryStore
from trsr_dist.files import read_json

WORDS = "quiet river final stocks Müller paper 雨の日 letter São garden ёлка harbour 🎾 morning".split()
NUM_ITEMS, NUM_USERS = 24, 10
START = 1_600_000_000
NAMES = {
    "mind": ("news.tsv", "behaviors.tsv"),
    "amazon_m2": ("products_train.csv", "sessions_train.csv"),
    "jsonl": ("items.jsonl", "interactions.jsonl"),
}
VARIANTS = ("mind", "mind impressions", "amazon_m2 UK", "amazon_m2", "jsonl users", "jsonl clicks")
SETTINGS: dict[str, dict[str, Any]] = {
    "data.unknown_items=skip": {"unknown": "skip"},
    "data.empty_items=skip": {"empty": "skip"},
    "data.encoding_errors=replace": {"encoding": "replace"},
    "data.min_history=3": {"min_history": 3},
    "data.max_history=3": {"max_history": 3},
    "data.max_history=4 data.long_histories=cut": {"max_history": 4, "long": "cut"},
    "data.repeated_target=keep": {"repeated": "keep"},
    "data.candidates=popularity": {},
    "data.candidates=targets data.too_few_negatives=skip": {},
    "data.candidates=category data.too_few_negatives=skip": {},
    "data.seen_before_target=true data.too_few_negatives=skip": {},
    "data.split_by=time": {},
    "data.max_users=4": {},
    "train.pool_size=10000000": {},
    "evaluate.negatives_per_positive=1000000": {},
    "data.max_history=1000000000": {},
}
"""Overrides, and what they change in the reading."""
ROUTINE = {
    "items_read", "users_read", "items_with_normalized_white_space", "products_of_other_locales",
    "sessions_of_other_locales", "users_above_max_users", "users_with_small_pool", "users_with_too_few_negatives",
}  # fmt: skip
"""Counts that say nothing of the change."""
KEYS = ("data.", "train.", "evaluate.", "run.")
HEADER_ROWS = {
    "news.tsv": "news_id\tcategory\tsubcategory\ttitle\tabstract\turl\ttitle_entities\tabstract_entities",
    "behaviors.tsv": "impression_id\tuser_id\ttime\thistory\timpressions",
}


@dataclass
class Set:
    """A small set in rows: lists of cells, or JSON objects."""

    variant: str
    rows: dict[str, list[Any]]
    policy: Policy
    overrides: list[str] = field(default_factory=list)
    title: str = ""
    same: bool = False
    """Only the form was changed."""
    names: tuple[str, ...] = ()
    """Files that an error must name, where not any will do."""
    nobody: bool = False

    @property
    def format(self) -> str:
        return self.variant.partition(" ")[0]

    @property
    def files(self) -> tuple[str, str]:
        return NAMES[self.format]


def make_set(draw: random.Random) -> Set:
    """A right set of any format."""
    variant = draw.choice(VARIANTS)
    items = [f"N{i}" for i in range(NUM_ITEMS)]
    titles = {item: " ".join(draw.sample(WORDS, 3)) + f" {item[1:]}" for item in items}
    users = {f"U{i}": draw.sample(items, draw.randint(4, 6)) for i in range(NUM_USERS)}
    made = {"mind": _mind, "amazon_m2": _amazon, "jsonl": _jsonl}[variant.partition(" ")[0]](variant, titles, users)
    policy = Policy(
        target="impression" if variant.endswith("impressions") else "last",
        locale="UK" if variant.endswith("UK") else "",
    )
    overrides = [f"data.target={policy.target}"] * (policy.target == "impression")
    overrides += [f"data.locale={policy.locale}"] * bool(policy.locale)
    return Set(variant, made, policy, overrides)


def _mind(variant: str, titles: dict[str, str], users: dict[str, list[str]]) -> dict[str, list[Any]]:
    news = [
        [item, f"c{i % 3}", f"s{i % 2}", title, "abstract", "url", "[]", "[]"]
        for i, (item, title) in enumerate(titles.items())
    ]
    rows = []
    for i, (user, clicks) in enumerate(users.items()):
        shown = [f"{item}-0" for item in titles if item not in clicks][:6]
        clicked = [item for item in titles if item not in clicks][-1]
        rows.append(
            [str(i), user, f"11/{9 + i}/2019 5:53:{i:02d} AM", " ".join(clicks), " ".join([*shown, f"{clicked}-1"])]
        )
    return {"news.tsv": news, "behaviors.tsv": rows}


def _amazon(variant: str, titles: dict[str, str], users: dict[str, list[str]]) -> dict[str, list[Any]]:
    header = ["id", "locale", "title", "price", "brand", "color", "size", "model", "material", "author", "desc"]
    products = [header]
    for i, (item, title) in enumerate(titles.items()):
        products.append(
            [item, "UK", title, f"{i}.5", f"brand{i % 4}", "", "", "", "", "", f'line "one"\nline two, {i}']
        )
        products.append([item, "DE", f"{title} auf Deutsch", "", "", "", "", "", "", "", ""])
    sessions = [["prev_items", "next_item", "locale"]]
    for i, clicks in enumerate(users.values()):
        sessions.append([f"[{' '.join(repr(item) for item in clicks[:-1])}]", clicks[-1], "DE" if i % 4 == 3 else "UK"])
    return {"products_train.csv": products, "sessions_train.csv": sessions}


def _jsonl(variant: str, titles: dict[str, str], users: dict[str, list[str]]) -> dict[str, list[Any]]:
    items = [
        {"id": item, "text": title, "category": f"c{i % 3}"}
        if i % 2
        else {"id": item, "title": title, "tags": ["a", "b"], "category": f"c{i % 3}"}
        for i, (item, title) in enumerate(titles.items())
    ]
    if variant.endswith("users"):
        rows = [
            {"user": user, "history": clicks[:-1], "target": clicks[-1], "time": START + 60 * i, "shown": []}
            for i, (user, clicks) in enumerate(users.items())
        ]
    else:
        rows = [
            {"user": user, "item": item, "time": START + 1000 * i + 10 * place}
            for i, (user, clicks) in enumerate(users.items())
            for place, item in enumerate(clicks)
        ]
    return {"items.jsonl": items, "interactions.jsonl": rows}


def encode(name: str, rows: list[Any]) -> bytes:
    """A file of these rows; rows that are text stand as they are."""
    if name.endswith(".csv"):
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(rows)
        return stream.getvalue().encode("utf-8", "surrogatepass")
    join = "\t".join if name.endswith(".tsv") else dump
    return "".join((row if isinstance(row, str) else join(row)) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def write(raw: Path, made: Set) -> None:
    raw.mkdir()
    for name, rows in made.rows.items():
        (raw / name).write_bytes(encode(name, rows))


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


def make(draw: random.Random, folder: Path, world: None) -> Case:
    """A set with one kind of change, and up to two settings."""
    made = make_set(draw)
    raw = folder / "raw"
    before = draw.random() < 0.5
    if before:
        change_rows(draw, made)
    write(raw, made)
    if not before:
        draw.choice(AFTER)(draw, made, raw)
    chosen = draw.sample(sorted(SETTINGS), 0 if made.same else draw.choice((0, 0, 1, 2)))
    for setting in chosen:
        made.overrides += setting.split()
        made.policy = replace(made.policy, **SETTINGS[setting])
    config = folder / "config.yaml"
    config.write_text(f"data:\n  format: {made.format}\n  path: {raw}\n")
    small = [
        f"run.dir={folder / 'run'}",
        "train.pool_size=4",
        "evaluate.negatives_per_positive=2",
        "data.split=[2,1,1]",
    ]
    overrides = small + made.overrides

    def act() -> int:
        if not made.nobody:
            return prepare(load_config(config, overrides))
        with as_nobody():
            return prepare(load_config(config, overrides))

    names = made.names or (*made.files, *KEYS)
    title = f"{made.variant}: {made.title}{''.join(f', {setting}' for setting in chosen)}"
    return Case(title, act, names, partial(_judge, made, raw, folder), made.same)


def _judge(made: Set, raw: Path, folder: Path, status: int, output: str) -> str:
    found = sorted(path.parent for path in folder.rglob("train.arrow"))
    if status:
        return f"an error, and {found[0]} all the same" if found else ""
    if not found:
        return "success without an output"
    counts = read_json(found[0] / "manifest.json")["counts"]
    is_said = any(count for name, count in counts.items() if name not in ROUTINE)
    try:
        expected = meaning(made.format, raw, made.policy)
    except Refused as reason:
        return "" if is_said else f"no count says that the reference refuses it ({str(reason)[:100]})"
    fault = compare(expected, HistoryStore(found[0]), made)
    if not fault and expected.losses and not is_said:
        return f"not counted: {expected.losses[0]}"
    return fault


def compare(expected: Meaning, store: HistoryStore, made: Set) -> str:
    """The first difference between what the files mean and what was written."""
    items = store.catalogue
    texts = {items.id(row): plain(items.text(row)) for row in range(len(items))}
    for item in texts.keys() | expected.items.keys():
        if texts.get(item) != expected.items.get(item):
            return f"item {item!r}: {texts.get(item, 'nothing')[:80]!r}, expected {expected.items.get(item, 'nothing')[:80]!r}"
    wanted = list(expected.users)
    for split in SPLITS:
        for index in range(store.num_users(split)):
            row = store.user(split, index)
            own = {items.id(i) for i, label in zip(row.candidates, row.labels, strict=True) if label}
            others = {items.id(i) for i, label in zip(row.candidates, row.labels, strict=True) if not label}
            history = tuple(items.id(i) for i in row.history)
            if others & (own | set(history)) or len(set(row.candidates)) != len(row.candidates):
                return f"user {row.user!r}: negatives {others}, targets {own}, history {history}"
            match = [
                entry for entry in wanted if entry[0] in ("", row.user) and _is_equal(entry[1], history, own, row.time)
            ]
            if not match:
                known = [user for key, user in wanted if key == row.user]
                return f"user {row.user!r}: {history} -> {own} at {row.time}, expected {known}"
            wanted.remove(match[0])
    may_lack = any(word in " ".join(made.overrides) for word in ("max_users", "too_few"))
    return f"users missing: {wanted[:1]}" if wanted and not may_lack else ""


def _is_equal(user: User, history: tuple[str, ...], targets: set[str], time: int) -> bool:
    times = () if user.time is None else (user.time, *(user.time * scale for _, scale in SCALES))
    if times and not any(abs(time - value) <= 1 + abs(value) * 1e-9 for value in times):
        return False
    if not user.ordered:
        return {*history, *targets} == {*user.history, *user.targets}
    return history == user.history and targets == user.targets


KIND = Kind("raw", 2000, 15.0, lambda folder: None, make)
