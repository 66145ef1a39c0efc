"""Small right sets of raw files, in rows, before they are changed and written."""

from __future__ import annotations

import csv
import io
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import dump
from tests.fuzz.rows import Policy

WORDS = [
    "quiet",
    "river",
    "final",
    "stocks",
    "Müller",
    "paper",
    "雨の日",
    "letter",
    "São",
    "garden",
    "ёлка",
    "harbour",
    "🎾",
    "morning",
]
NUM_ITEMS, NUM_USERS = 24, 10
START = 1_600_000_000
NAMES = {
    "mind": ("news.tsv", "behaviors.tsv"),
    "amazon_m2": ("products_train.csv", "sessions_train.csv"),
    "jsonl": ("items.jsonl", "interactions.jsonl"),
}
VARIANTS = ("mind", "mind impressions", "amazon_m2 UK", "amazon_m2", "jsonl users", "jsonl clicks")


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
