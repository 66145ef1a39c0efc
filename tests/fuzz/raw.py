"""Raw files of every format, changed in their rows, bytes, values, form or place, through the preparation job.

Oracle: ``reference.meaning``, a second reader. Where it refuses the files, success must come with a count of what was
left out; where it reads them, users, histories, targets, times and texts must be equal, negatives must be none of the
user's own items, and what was lost must be counted. Changes of form alone (``same``) must succeed. An error must leave
no histories, and one for a file that is nothing at all must name that file.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.changes import AFTER, change_rows
from tests.fuzz.mutations import as_nobody
from tests.fuzz.reference import Meaning, User, meaning
from tests.fuzz.rows import SCALES, RefusedError, plain
from tests.fuzz.running import Case, Kind
from tests.fuzz.sets import Set, make_set, write
from trsr_dist.config import load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore
from trsr_dist.files import read_json
from trsr_dist.run import SPLITS

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
    if sum(setting.startswith("data.max_history") for setting in chosen) > 1:
        del chosen[1:]
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

    names = (*made.names, *(setting.partition("=")[0] for setting in chosen)) if made.names else (*made.files, *KEYS)
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
    except RefusedError as reason:
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
            found, wanted = (known.get(item, "nothing")[:80] for known in (texts, expected.items))
            return f"item {item!r}: {found!r}, expected {wanted!r}"
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


KIND = Kind("raw", 2000, 40.0, lambda folder: None, make)
