"""A small prepared data set, written with the store's own writer, and a job on it in a separate process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from trsr_dist.config import load_config
from trsr_dist.config.sections import SummarizeSection
from trsr_dist.data.store import ITEM_SCHEMA, USER_SCHEMA, ArrowWriter, checksums
from trsr_dist.hashing import random_stream
from trsr_dist.run import write_manifest
from trsr_dist.summarize.engines import build
from trsr_dist.summarize.job import summarize
from trsr_dist.summarize.requests import EngineSettings

ROOT = Path(__file__).parents[2]
NUM_ITEMS = 120
TOPICS = ["sports/tennis", "sports/golf", "finance/markets", "food/recipes", "travel/islands"]
WORDS = "quiet river final stocks window paper winter letter garden signal harbour morning".split()  # noqa: SIM905


def item_text(row: int) -> str:
    draw = random_stream("item", row)
    category, subcategory = TOPICS[row % len(TOPICS)].split("/")
    return f"category: {category}; subcategory: {subcategory}; title: {' '.join(draw.sample(WORDS, 4))} {row}"


def write_histories(
    run: Path, users: dict[str, int], max_history: int = 40, least: int = 1, more: int = 0, leak: bool = False
) -> None:
    """RUN/histories with the given number of users in each split, one target and three negatives each.

    Args:
        run: the run folder.
        users: by split.
        max_history: most items of a user.
        least: fewest items of a user.
        more: items that each user has on top of that.
        leak: the target is in the history.
    """
    folder = run / "histories"
    folder.mkdir(parents=True)
    with ArrowWriter(folder / "items.arrow", ITEM_SCHEMA) as writer:
        for row in range(NUM_ITEMS):
            writer.add(f"N{row}", item_text(row), TOPICS[row % len(TOPICS)].split("/")[0], 1, 0)
    for split in ("train", "valid", "test"):
        with ArrowWriter(folder / f"{split}.arrow", USER_SCHEMA) as writer:
            for number in range(users.get(split, 0)):
                draw = random_stream(split, number)
                items = draw.sample(range(NUM_ITEMS), NUM_ITEMS)
                history = items[: draw.randint(least, max_history) + more]
                candidates = [history[0] if leak else items[-1], *items[-4:-1]]
                writer.add(f"{split}-{number}", history, candidates, [1, 0, 0, 0], number)
    write_manifest(folder, "prepare", {}, {}, files=checksums(folder), users=users, lengths=[least, max_history, more])


def write_config(run: Path, **sections: dict) -> Path:
    """A config file for the run; sections are merged over the defaults of these tests."""
    settings: dict = {
        "run": {"dir": str(run), "tensorboard": False},
        "data": {"format": "demo"},
        "summarize": {"users_per_shard": 8, "max_new_tokens": 40, "max_in_flight": 16},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def engine_settings(model: str = "small", **changes: object) -> EngineSettings:
    """Of an engine that asks a model."""
    few = {"max_prompt_tokens": 400, "max_in_flight": 1, "timeout_seconds": 10.0, "max_retries": 0}
    made = build.engine_settings(SummarizeSection(model=model))
    return replace(made, **{"chat_template_kwargs": {}, **few, **changes})


def start(config: Path, *arguments: str, rank: int = 0, world_size: int = 1) -> subprocess.Popen:
    """A task of the job, as a launcher would start it."""
    command = [sys.executable, "-c", _TASK, str(rank), str(world_size), "--config", str(config), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


_TASK = """
import os, runpy, sys
rank, size = sys.argv[1:3]
os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size, OMP_NUM_THREADS="1")
sys.argv = ["launch/summarize.py", *sys.argv[3:]]
runpy.run_path("launch/summarize.py", run_name="__main__")
"""


def run_here(config: Path, *overrides: str, force: bool = False) -> None:
    """The only task of a job, in this process."""
    assert summarize(load_config(config, overrides), force) == 0


def run_job(config: Path, *arguments: str) -> str:
    """One task to its end, in a separate process; its output."""
    process = start(config, *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def tree_hash(folder: Path) -> dict[str, str]:
    """Name and hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
