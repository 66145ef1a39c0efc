"""A training whose shards are in a store has the losses of one that reads them from disk, a dead server between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from werkzeug.wrappers import Response

from tests.spawn import run_ranks
from tests.stores import running_store
from tests.train.world import losses_of, make_run, start
from trsr_dist import stores

STEPS = {"max_steps": 5, "save_every_steps": 2}
MEASURED, TRAINED = 121, 45
"""Reads that find the token lengths of 120 users, and more until the server dies."""


def train_all(rank: int, world_size: int, *trainings: tuple[Path, dict[str, Any]]) -> list[str]:
    stores.PAUSE_SECONDS, stores.TRY_SECONDS = 0.01, 3.0
    return [start(run, train=train) for run, train in trainings]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("disk"))
    assert run_ranks(train_all, 1, (run, STEPS)) == [["0"]]
    return run


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_server_that_dies_costs_no_step(disk: Path, tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path / "run")
    with running_store(kind, tmp_path / "served") as store:
        for tar in (run / "shards" / "train").glob("*.tar"):
            store.put(tar, f"shards/train/{tar.name}")
            tar.unlink()
        store.paths.clear()
        store.fault = lambda path: Response(status=444) if len(store.paths) > MEASURED + TRAINED else None
        train = STEPS | {"shards_url": store.url("shards/train"), "num_workers": 1}
        local, dead = run_ranks(train_all, 1, (run, STEPS), (run, train))[0]
        assert local.endswith("train-000000.tar: missing, the manifest names it; restore the split")
        assert dead.startswith(f"RunError: {store.url('shards/train/train-00000')}")
        assert "3 times; check the network and the store" in dead and "Traceback" not in dead
        assert 1 < max(losses_of(run)) < STEPS["max_steps"], "it died in the middle"
        store.fault = lambda path: None
        assert run_ranks(train_all, 1, (run, train | {"cache_dir": str(tmp_path / "cache")})) == [["0"]]
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert losses_of(run) == losses_of(disk)
