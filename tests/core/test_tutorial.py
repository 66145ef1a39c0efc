"""The tutorial's commands, as they stand there, on a made log of two days."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.merge.models import make_base
from tests.spawn import ROOT, run_script
from trsr_dist.files import read_json

LAUNCHERS = (["python"], ["deepspeed"], ["torchrun", "--nproc_per_node", "2"])
SIZES = [
    "summarize.engine=extractive",
    "data.candidates=uniform",
    "train.pool_size=10",
    "train.row_tokens=1024",
    "train.rows_per_step=4",
    "train.max_steps=2",
    "train.num_workers=0",
    "evaluate.negatives_per_positive=10",
]
"""A user's data are larger, the commands the same."""
DAYS = {1: (90, 12), 2: (96, 17)}
"""Users, and items of those who came back."""


def write_log(folder: Path, num_users: int, num_days: int) -> None:
    folder.mkdir(exist_ok=True)
    items = [
        {"id": f"a{i}", "title": f"{('shoe', 'tent', 'lamp')[i % 3]} {i}", "brand": f"B{i % 7}"} for i in range(60)
    ]
    clicks = []
    for user in range(num_users):
        draw = random.Random(user)
        chosen = [f"a{draw.randrange(60)}" for _ in range(num_days if user % 2 else 12)]
        clicks += [
            {"user": f"u{user}", "item": item, "time": 1_700_000_000 + day * 86_400} for day, item in enumerate(chosen)
        ]
    for name, rows in {"items": items, "interactions": clicks}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def commands() -> list[list[str]]:
    """Of all shell blocks, in their order."""
    lines, inside = [], False
    for line in (ROOT / "docs" / "tutorial.md").read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```sh"
        elif inside:
            lines.append(shlex.split(line))
    return lines


class Reader:
    """Types the commands, with a folder for ``my_data``, ``runs`` and the request files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sizes = [*SIZES, f"model.name_or_path={make_base(folder / 'base')}"]

    def type(self, command: list[str]) -> str:
        """What it prints; it must succeed."""
        words = [self._place(word) for word in command]
        if words[0] in ("mkdir", "cp"):
            return subprocess.run(words, check=True, capture_output=True, text=True).stdout
        launcher = next(launcher for launcher in LAUNCHERS if words[: len(launcher)] == launcher)
        script, *arguments = words[len(launcher) :]
        if "--config" in arguments:
            arguments += self._sizes
        done = run_script(script, *arguments)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _place(self, word: str) -> str:
        key, equals, value = word.rpartition("=")
        first = value.split("/")[0]
        return f"{key}{equals}{self.folder / value}" if first in OWN else word


OWN = {"my_data", "runs", "requests.jsonl", "ranked.jsonl"}


def num_texts(run: Path) -> int:
    """Prompts that were answered for a run or those before it."""
    return sum(len(path.read_bytes().splitlines()) for path in (run / "summaries" / "journal").iterdir())


@pytest.mark.timeout(600)
def test_both_days(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    line = {"id": "u1", "items": ["title: shoe 1"], "candidates": ["title: tent 2", "title: lamp 3"]}
    (tmp_path / "requests.jsonl").write_text(json.dumps(line) + "\n")
    write_log(tmp_path / "my_data", *DAYS[1])
    texts, printed = {}, {}
    for command in commands():
        if command[0] == "mkdir":
            write_log(tmp_path / "my_data", *DAYS[2])
            texts[1] = num_texts(tmp_path / "runs" / "day1")
        printed[shlex.join(command)] = reader.type(command)
    runs = tmp_path / "runs"
    assert len((tmp_path / "ranked.jsonl").read_text().splitlines()) == 1
    status = printed["python tools/status.py runs/day2"]
    nodes = sum(
        read_json(runs / "day2" / "shards" / s / "manifest.json")["counts"]["nodes"] for s in ("train", "valid", "test")
    )
    made = num_texts(runs / "day2") - texts[1]
    assert 0 < made < nodes / 2, "most of the second day's prompts are those of the first"
    assert f"{nodes} prompts, {nodes - made} from the cache" in status
    compared = next(text for command, text in printed.items() if "compare.py" in command)
    assert f"A: {runs}/day2/evaluation" in compared and f"B: {runs}/day2/yesterday" in compared
    origin = read_json(runs / "day2" / "checkpoints" / "step-000002" / "provenance.json")["init_adapter"]
    assert str(runs / "day1" / "checkpoints") in json.dumps(origin)
