"""A whole small run, made by the stages themselves: demo data, summaries, a random base, an adapter, a merged model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.merge.models import make_base, make_checkpoint, seal
from tests.spawn import free_port, run_script
from tests.tokenizers import byte_level
from trsr_dist.config import Config, load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.evaluate.score_files import ScoreFolder
from trsr_dist.files import read_json, write_json
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import manifest_hash
from trsr_dist.summarize.job import summarize

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SETTINGS: dict[str, dict[str, Any]] = {
    "demo": {"num_users": 225, "num_items": 400},
    "data": {"format": "demo", "candidates": "targets", "split": [2, 1, 6], "max_history": 12, "long_histories": "cut"},
    "summarize": {"max_new_tokens": 12, "users_per_shard": 60},
    "prompt": {"recent_items": 2, "max_tokens": 308, "max_candidate_tokens": 90, "style": "plain"},
    "model": {"name_or_path": "RUN/base"},
    "train": {"precision": "float32", "pool_size": 6},
    "evaluate": {"negatives_per_positive": 6, "top_k": [1, 3], "row_tokens": 2048, "bootstrap_samples": 50},
}
PASSES = ("model", "control")


def make_run(run: Path) -> Path:
    """A run folder whose checkpoint and merged model are the same model. 150 of its users are held out."""
    config = write_config(run)
    prepare(config)
    summarize(config)
    merge(make_trained(run, config), run / "merged", MergeOptions(verify="weights"))
    return run


def make_trained(run: Path, config: Config) -> Path:
    """A base and a checkpoint of it with the run's own prompts."""
    folder = make_checkpoint(make_base(run / "base"), run / "checkpoints" / "step-000007")
    builder = PromptBuilder(byte_level(chat=True), **config.prompt.model_dump())
    own = {
        "prompt": builder.settings,
        "answer_ids": list(builder.answer_ids),
        "shards": {"train": manifest_hash(run / "shards" / "train")},
        "config": config.model_dump(mode="json"),
    }
    write_json(folder / "provenance.json", read_json(folder / "provenance.json") | own)
    seal(folder)
    return folder


def write_config(folder: Path, name: str = "config.yaml", **changes: dict[str, Any]) -> Config:
    """A config of the run, kept under this name; changes go into the sections."""
    sections: dict[str, Any] = {"run": {"dir": str(folder), "seed": 0, "tensorboard": False}} | SETTINGS
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(sections))
    return load_config(path)


def start(run: Path, output: Path, ranks: int = 0) -> subprocess.Popen:
    """tools/evaluate.py, as a user starts it.

    Args:
        run: with config and models.
        output: of the evaluation.
        ranks: under torchrun; 0: one process.
    """
    launcher = [sys.executable]
    if ranks:
        launcher = [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    command = [*launcher, "tools/evaluate.py", *map(str, arguments_of(run, output))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_command(run: Path, output: Path, ranks: int = 0, **environment: str) -> tuple[int, str]:
    """Exit status and output of the finished command."""
    if not ranks:
        done = run_script("tools/evaluate.py", *arguments_of(run, output), **environment)
        return done.returncode, done.stdout + done.stderr
    process = start(run, output, ranks)
    try:
        text, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, text


def arguments_of(run: Path, output: Path) -> list[object]:
    """Of tools/evaluate.py."""
    return ["--config", run / "config.yaml", "--model", "RUN/merged", "--output", output]


def parts_of(output: Path, name: str = "model") -> dict[str, bytes]:
    """Part files of a pass."""
    return {path.name: path.read_bytes() for path in sorted((output / "test" / name).glob("part-*.jsonl"))}


def numbers_of(output: Path) -> dict[str, Any]:
    """The results file."""
    return read_json(output / "test.json")


def scores_of(output: Path, name: str = "model") -> dict[tuple[str, str], float]:
    """Scores of a pass by user and item."""
    found = ScoreFolder(output / "test" / name).users()
    return {(user.user, item): s for user in found for item, s in zip(user.items, user.scores.tolist(), strict=True)}
