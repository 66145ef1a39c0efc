"""Small raw files in every format, written by the tests themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trsr_dist.config import Config, load_config

NUM_ITEMS = 60
LENGTH = 6
"""Clicks of a user, the target included."""


def make_config(folder: Path, data_format: str, *overrides: str) -> Config:
    """A config whose raw files lie in ``folder/raw_files`` and whose run is ``folder/run``."""
    path = folder / "config.yaml"
    path.write_text(f"data:\n  format: {data_format}\n  path: {folder / 'raw_files'}\n")
    small = ["train.pool_size=6", "evaluate.negatives_per_positive=5", "data.split=[2,1,1]"]
    return load_config(path, [f"run.dir={folder / 'run'}", *small, *overrides])


def clicks(user: int) -> list[str]:
    """Different items, other ones for each user."""
    return [f"N{(user * 7 + 11 * i) % NUM_ITEMS}" for i in range(LENGTH)]


def news_line(i: int) -> str:
    return f"N{i}\tcat{i % 3}\tsub{i % 6}\tTitle  number {i}\tAbstract {i}\turl\t[]\t[]\n"


def behavior_line(user: int, history: list[str], impressions: str = "N1-0") -> str:
    return f"{user}\tU{user}\t11/{9 + user % 5}/2019 5:53:{user % 60:02d} AM\t{' '.join(history)}\t{impressions}\n"


def write_mind(folder: Path, users: int = 24) -> Path:
    """news.tsv and behaviors.tsv; returns their folder."""
    raw = folder / "raw_files"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "news.tsv").write_text("".join(map(news_line, range(NUM_ITEMS))))
    shown = [f"N{i}-0" for i in range(40, NUM_ITEMS)]
    lines = []
    for user in range(users):
        own = clicks(user)
        other = next(f"N{i}" for i in range(user % 40, 40) if f"N{i}" not in own)
        rest = [cell for cell in shown if cell[:-2] not in own]
        lines.append(behavior_line(user, own, " ".join([*rest, f"{other}-1"])))
    (raw / "behaviors.tsv").write_text("".join(lines))
    return raw


def write_amazon(folder: Path, users: int = 24) -> Path:
    """products_train.csv, with line ends inside descriptions, and sessions_train.csv."""
    raw = folder / "raw_files"
    raw.mkdir(parents=True, exist_ok=True)
    products = ["id,locale,title,price,brand,color,size,model,material,author,desc\n"]
    for i in range(NUM_ITEMS):
        products.append(f'N{i},UK,"Lamp, no {i}",{i}.5,Brand{i % 4},,,,,,"First line\nsecond ""line"" {i}"\n')
        products.append(f"N{i},DE,Lampe {i},,,,,,,,\n")
    (raw / "products_train.csv").write_text("".join(products))
    sessions = ["prev_items,next_item,locale\n"]
    for user in range(users):
        own = clicks(user)
        prev = " ".join(f"'{item}'" for item in own[:3]) + "\n " + " ".join(f"'{item}'" for item in own[3:-1])
        sessions.append(f'"[{prev}]",{own[-1]},{"UK" if user % 4 else "DE"}\n')
    (raw / "sessions_train.csv").write_text("".join(sessions))
    return raw


def write_jsonl(folder: Path, records: list[dict[str, Any]], items: list[dict[str, Any]] | None = None) -> Path:
    """items.jsonl and interactions.jsonl."""
    raw = folder / "raw_files"
    raw.mkdir(parents=True, exist_ok=True)
    items = items or [{"id": f"N{i}", "text": f"Thing {i}", "category": f"c{i % 2}"} for i in range(NUM_ITEMS)]
    for name, rows in (("items", items), ("interactions", records)):
        (raw / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return raw


def user_records(users: int = 24) -> list[dict[str, Any]]:
    """Rows of the form user, history, target."""
    own = [clicks(user) for user in range(users)]
    return [
        {"user": f"u{i}", "history": row[:-1], "target": row[-1], "time": 1000 + i, "shown": ["N50", "N51", row[0]]}
        for i, row in enumerate(own)
    ]
