"""Both schemes on real news, with the transformers engine and a small model made here."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from tests.summarize.models import write_model
from tests.summarize.world import ROOT, run_here, start, tree_hash
from trsr_dist.config import load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.files import read_json
from trsr_dist.shards.reader import ShardSet

MIND = ROOT / "../shared/data/mind"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (MIND / "news.tsv").is_file(), reason=f"{MIND}: no MIND data"),
]
USERS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), chat=True)


def prepared(folder: Path, model: Path, scheme: str) -> tuple[Path, Path]:
    """Run folder and config; the longest prompts are trimmed, the longest texts cut."""
    settings = {
        "run": {"dir": str(folder / "run"), "tensorboard": False},
        "data": {"format": "mind", "path": str(MIND), "min_history": 8, "max_users": USERS, "unknown_items": "skip"},
        "summarize": {
            "scheme": scheme,
            "engine": "transformers",
            "model": str(model),
            "max_prompt_tokens": 400,
            "max_new_tokens": 12,
            "users_per_shard": 2,
            "lease_seconds": 4,
            "fan_in": 3,
            "failed_users": "recent_only",  # babble is empty now and then, even when sampled
        },
    }
    folder.mkdir()
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    prepare(load_config(config))
    return folder / "run", config


@pytest.mark.parametrize("scheme", ["hierarchical", "recurrent"])
def test_texts_do_not_depend_on_the_batch(tmp_path: Path, model: Path, scheme: str) -> None:
    run, config = prepared(tmp_path / "alone", model, scheme)
    run_here(config, "summarize.max_in_flight=1")
    check_samples(run, scheme)
    crowd, config = prepared(tmp_path / "crowd", model, scheme)
    run_here(config, "summarize.max_in_flight=16")
    assert tree_hash(crowd / "shards") == tree_hash(run / "shards")


def test_texts_do_not_depend_on_worker_or_restart(tmp_path: Path, model: Path) -> None:
    run, config = prepared(tmp_path / "alone", model, "recurrent")
    run_here(config)
    wild, config = prepared(tmp_path / "wild", model, "recurrent")
    killed, other = (start(config, rank=rank, world_size=2) for rank in range(2))
    while not list(wild.glob("summaries/journal/*")) and killed.poll() is None:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    output, _ = other.communicate(timeout=200)
    assert other.returncode == 0, output
    assert tree_hash(wild / "shards") == tree_hash(run / "shards")


def check_samples(run: Path, scheme: str) -> None:
    """Every user once; most with a summary, its provenance and true counts."""
    users, summaries = [], set()
    for split in ("train", "valid", "test"):
        shards = ShardSet(run / "shards" / split)
        for sample in shards.read_many(range(len(shards))):
            users.append(sample.user)
            if "failed" in sample.provenance:
                continue
            summaries.add(sample.summary)
            told, summarizer = sample.provenance, sample.provenance["summarizer"]
            num_blocks = -(-len(told["history"]) // 5)
            assert len(told["blocks"]) == num_blocks and told["scheme"] == scheme
            assert len(told["nodes"]) == num_blocks if scheme == "recurrent" else len(told["nodes"]) >= num_blocks
            assert all(len(key) == len(prompt) == 32 for *_, key, prompt in told["nodes"])
            assert summarizer["engine"] == "transformers" and len(summarizer["fingerprint"]) == 32
            assert {"revision", "temperature", "max_new_tokens", "prompt_style"} <= summarizer.keys()
            assert {"seed", "flags", "sampled", "words_cut", "wording"} <= told.keys()
    counts = read_json(run / "shards/train/manifest.json")["counts"]
    assert len(users) == len(set(users)) == USERS
    assert "" not in summaries and len(summaries) >= USERS - 3
    assert counts["flag_cut"] and counts["words_cut"] and counts["nodes"]
