"""Tests on real weights, real tokenizers and real texts; `make test-real` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.assets import data_settings
from trsr_dist.config import load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.records import Sample
from trsr_dist.run import SPLITS
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize.job import summarize

FEW = ["data.max_users=260", "prompt.recent_items=5", "train.pool_size=4", "evaluate.negatives_per_positive=4"]
"""As many recent items as ``PromptBuilder`` shows by default."""
TIMEOUT_SECONDS = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/real/" in item.path.as_posix():
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of 260 users, with extractive summaries in its shards."""
    folder = tmp_path_factory.mktemp("real") / "run"
    settings = [f"run.dir={folder}", "run.tensorboard=false", *data_settings(), *FEW]
    config = load_config("configs/smollm2.yaml", settings)
    assert prepare(config) == summarize(config) == 0
    return folder


@pytest.fixture(scope="session")
def users(run: Path) -> list[Sample]:
    """Of all splits."""
    shards = [ShardSet(run / "shards" / split) for split in SPLITS]
    return [sample for split in shards for sample in split.read_many(range(len(split)))]
