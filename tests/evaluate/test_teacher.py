"""Scores of the train users: the same on any number of ranks and after kills, bound to model and shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.spawn import run_ranks
from trsr_dist.config import load_config
from trsr_dist.errors import DataError, ModelError, RunError
from trsr_dist.evaluate import passes
from trsr_dist.evaluate.score_files import read_scores
from trsr_dist.evaluate.teacher import plan_scoring, score_shards
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.tables import TABLE, open_table

NUM_PARTS = 3


def score(rank: int, world_size: int, run: Path, *, model: str = "RUN/merged", override: str = "") -> None:
    """The job in small parts."""
    passes.USERS_PER_PART = 16
    overrides = [f"run.dir={run}", *([override] if override else [])]
    assert score_shards(load_config(run / "config.yaml", overrides), model) == 0


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "USERS_PER_PART", 16)


def copy_run(run: Path, folder: Path) -> Path:
    """A run with its own shards."""
    folder.mkdir()
    for name in ("config.yaml", "histories", "base", "merged", "checkpoints"):
        (folder / name).symlink_to(run / name)
    shutil.copytree(run / "shards", folder / "shards")
    return folder


@pytest.fixture(scope="module")
def scored(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose train users two ranks have scored."""
    folder = copy_run(run, tmp_path_factory.mktemp("teacher") / "run")
    run_ranks(score, 2, folder)
    return folder


def scores_of(run: Path) -> Path:
    (folder,) = (run / "shards" / "train").glob("scores-*")
    return folder


def test_every_candidate_of_every_train_user_has_its_score_and_no_other_split_any(scored: Path) -> None:
    shards, folder = ShardSet(scored / "shards" / "train"), scores_of(scored)
    table = open_table(folder, shards, "")
    written = {user.user: user for path in folder.glob("part-*") for user in read_scores(path)}
    assert len(written) == len(shards) == len(table.values) and len(list(folder.glob("part-*"))) == NUM_PARTS
    for row, sample in zip(table.values, shards.read_many(range(len(shards))), strict=True):
        found = dict(zip(written[sample.user].items, written[sample.user].scores, strict=True))
        assert row.tolist() == [found[candidate.item] for candidate in sample.candidates]
    assert len(np.unique(table.values)) > table.values.size // 2, "equal scores would say nothing"
    assert table.manifest["trained_on_these_shards"] is True
    assert not [path for split in ("valid", "test") for path in (scored / "shards" / split).glob("scores-*")]


def test_one_process_goes_on_where_ranks_were_killed(run: Path, scored: Path, tmp_path: Path) -> None:
    folder = copy_run(scored, tmp_path / "run")
    scores = scores_of(folder)
    whole = (scores / TABLE).read_bytes()
    for name in ("part-000001.jsonl", "part-000002.jsonl", "manifest.json", TABLE):
        (scores / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in scores.glob("part-*")}
    score(0, 1, folder)
    assert (scores / TABLE).read_bytes() == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and len(kept) == NUM_PARTS - 2
    before = {path: path.stat().st_mtime_ns for path in scores.glob("[!.]*")}
    score(0, 1, folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished job is left alone"


def test_scores_of_other_settings_models_and_shards_are_refused(scored: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds scores made with row_tokens=2048, now 1024"):
        score(0, 1, scored, override="evaluate.row_tokens=1024")
    with pytest.raises(ModelError, match="no such folder"):
        score(0, 1, scored, model="RUN/nothing")
    config = load_config(scored / "config.yaml", [f"run.dir={scored}"])
    other, shards = plan_scoring(config, "RUN/checkpoints/step-000007")
    with pytest.raises(RunError, match=rf"not complete \(complete there: {scores_of(scored).name}\); score them"):
        open_table(other.folder, shards, "score them")
    valid = ShardSet(scored / "shards" / "valid")
    with pytest.raises(RunError, match="made with input shards="):
        open_table(scores_of(scored), valid, "score them")
    damaged = shutil.copytree(scores_of(scored), tmp_path / "damaged")
    (damaged / TABLE).write_bytes((damaged / TABLE).read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DataError, match="not those of the manifest"):
        open_table(damaged, shards, "score them")
