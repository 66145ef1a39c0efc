"""Scores of the train users, and pools mined by them: whole on any ranks and after kills, bound to what they read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.spawn import run_ranks
from tests.tokenizers import byte_level
from trsr_dist.config import load_config
from trsr_dist.environment import Ranks
from trsr_dist.errors import ConfigError, DataError, ModelError, RunError
from trsr_dist.evaluate import passes
from trsr_dist.evaluate.score_files import read_scores
from trsr_dist.evaluate.teacher import choose_hard, mine_negatives, plan_scoring, score_shards
from trsr_dist.model.loading import open_prompts
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import RunFolder, manifest_hash
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.plan import PackingSettings, TrainPlan
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.steps import Unit
from trsr_dist.shards.tables import MINED, TABLE, open_table
from trsr_dist.train.prepare import open_pool, open_stream

NUM_PARTS = 3


def score(
    rank: int, world_size: int, run: Path, *, model: str = "RUN/merged", override: str = "", force: bool = False
) -> None:
    """The job in small parts."""
    passes.USERS_PER_PART = 16
    overrides = [f"run.dir={run}", *([override] if override else [])]
    assert score_shards(load_config(run / "config.yaml", overrides), model, force) == 0


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
    table = open_table(folder, shards.manifest_hash, "")
    written = {user.user: user for path in folder.glob("part-*") for user in read_scores(path)}
    assert len(written) == len(shards) == len(table.values) and len(list(folder.glob("part-*"))) == NUM_PARTS
    for row, sample in zip(table.values, shards.read_many(range(len(shards))), strict=True):
        found = dict(zip(written[sample.user].items, written[sample.user].scores, strict=True))
        assert row.tolist() == [found[candidate.item] for candidate in sample.candidates]
    assert len(np.unique(table.values)) > table.values.size // 2, "equal scores would say nothing"
    assert table.manifest["trained_on_these_shards"] is True
    assert not [path for split in ("valid", "test") for path in (scored / "shards" / split).glob("scores-*")]


def score_apart(rank: int, world_size: int, run: Path) -> None:
    """As if a pointer had moved between the looks of two ranks."""
    score(rank, world_size, run, model=("RUN/merged", "RUN/checkpoints/step-000007")[rank])


def test_all_ranks_score_the_model_of_the_first(run: Path, scored: Path, tmp_path: Path) -> None:
    folder = copy_run(run, tmp_path / "run")
    run_ranks(score_apart, 2, folder)
    assert scores_of(folder).name == scores_of(scored).name
    found, expected = (np.load(scores_of(place) / "table.npy") for place in (folder, scored))
    assert np.array_equal(found, expected)


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
    score(0, 1, folder, override="evaluate.row_tokens=1024", force=True)
    again = open_table(scores, manifest_hash(folder / "shards" / "train"), "")
    assert again.manifest["settings"]["row_tokens"] == 1024 and (scores / TABLE).read_bytes() != whole
    first = open_table(scores_of(scored), manifest_hash(scored / "shards" / "train"), "")
    assert np.allclose(again.values, first.values, atol=1e-4)


def test_scores_of_other_settings_models_and_shards_are_refused(scored: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds scores made with row_tokens=2048, now 1024"):
        score(0, 1, scored, override="evaluate.row_tokens=1024")
    with pytest.raises(ModelError, match="no such folder"):
        score(0, 1, scored, model="RUN/nothing")
    config = load_config(scored / "config.yaml", [f"run.dir={scored}"])
    [(other, shards)] = plan_scoring(config, "RUN/checkpoints/step-000007")
    with pytest.raises(RunError, match=rf"not complete \(complete there: {scores_of(scored).name}\); score them"):
        open_table(other.folder, shards.manifest_hash, "score them")
    valid = manifest_hash(scored / "shards" / "valid")
    with pytest.raises(RunError, match="made with input shards="):
        open_table(scores_of(scored), valid, "score them")
    damaged = shutil.copytree(scores_of(scored), tmp_path / "damaged")
    (damaged / TABLE).write_bytes((damaged / TABLE).read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DataError, match="not those of the manifest"):
        open_table(damaged, shards.manifest_hash, "score them")


def test_the_hardest_below_the_margin_stay_and_the_safest_fill_up() -> None:
    scores = np.float32([1.0, 0.9, 3.0, -1.0, 0.2, 0.96, -5.0])
    positive = np.arange(7) == 0
    limit_at_94_percent = {1: [0, 1], 2: [0, 1, 4], 4: [0, 1, 3, 4, 6]}
    for num_negatives, expected in limit_at_94_percent.items():
        pool, filled = choose_hard(scores, positive, num_negatives, 0.94)
        assert (np.flatnonzero(pool).tolist(), filled) == (expected, 0)
    assert choose_hard(scores, positive, 5, 0.94)[1] == 1
    assert np.flatnonzero(~choose_hard(scores, positive, 5, 0.94)[0]).tolist() == [2], (
        "the likeliest positive goes first"
    )
    assert choose_hard(scores, positive, 20, 0.94)[0].all()
    two = (np.arange(7) == 0) | (np.arange(7) == 4)
    assert np.flatnonzero(choose_hard(scores, two, 1, 1.0)[0]).tolist() == [0, 3, 4, 6], "below the lowest positive"
    assert choose_hard(scores - 70, positive, 2, 0.94)[0].tolist() == choose_hard(scores, positive, 2, 0.94)[0].tolist()


def test_more_negatives_than_the_samples_keep_are_refused(run: Path) -> None:
    """Fewer would be drawn than the provenance says, and the calibration be corrected by a wrong ratio."""
    settings = ["train.negatives_per_positive=10", "train.pool_size=20"]
    config = load_config(run / "config.yaml", [f"run.dir={run}", *settings])
    builder = PromptBuilder(byte_level(chat=True), **config.prompt.model_dump())
    with pytest.raises(ConfigError, match="negatives_per_positive=10: .* keep 6 a positive; .* prepare again"):
        open_stream(config, RunFolder(run), Ranks(), builder, None)


def test_a_mined_pool_is_drawn_from_and_bound_to_scores_and_settings(scored: Path, tmp_path: Path) -> None:
    run = copy_run(scored, tmp_path / "run")
    config = load_config(run / "config.yaml", [f"run.dir={run}"])
    shards, scores = ShardSet(run / "shards" / "train"), scores_of(run)
    lengths = measure_lengths(shards, open_prompts(str(run / "merged"), config.prompt.model_dump()).builder)
    settings = PackingSettings(2048, 2, 2, 0)
    for part in scores.glob("part-*"):
        part.unlink()  # the table is enough
    with pytest.raises(RunError, match="not complete; run tools/mine_negatives.py"):
        open_pool(shards, 2)
    with pytest.raises(ConfigError, match=r"--negatives 7: the samples of .*train keep 6 a positive"):
        mine_negatives(config, "RUN/merged", 7, 0.95)
    assert mine_negatives(config, "RUN/merged", 3, 0.95) == 0
    made = (shards.folder / MINED / TABLE).read_bytes()
    pool = open_pool(shards, 2)
    assert (pool.values.sum(1) == 4).all()
    with pytest.raises(ConfigError, match="negatives_per_positive=4: .* keeps 3 per positive"):
        open_pool(shards, 4)
    plan, plain = TrainPlan(lengths, settings, pool), TrainPlan(lengths, settings)
    drawn = {(unit.sample, c) for epoch in range(9) for unit in units_of(plan, epoch) for c in unit.candidates}
    assert drawn == set(zip(*map(np.ndarray.tolist, np.nonzero(pool.values)), strict=True)), "all of it, no other"
    assert all(len(unit.candidates) == 3 for unit in units_of(plan, 0))
    assert plan.identity != plain.identity, "a checkpoint goes on with the pool that it began with"
    assert mine_negatives(config, "RUN/merged", 3, 0.95) == 0
    with pytest.raises(RunError, match="made with setting negatives_per_positive=3, now 2"):
        mine_negatives(config, "RUN/merged", 2, 0.95)
    assert (shards.folder / MINED / TABLE).read_bytes() == made
    shutil.rmtree(scores)
    with pytest.raises(RunError, match="run tools/score_shards.py with this config and --model RUN/merged"):
        mine_negatives(config, "RUN/merged", 2, 0.95, force=True)


def units_of(plan: TrainPlan, epoch: int) -> list[Unit]:
    return [unit for window in plan.windows(epoch) for row in range(window.num_rows) for unit in window.units(row)]
