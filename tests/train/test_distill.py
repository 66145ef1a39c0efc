"""Distillation: the loss by hand, scores that stay with their candidates, and the same training on any ranks."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from tests.spawn import run_ranks
from tests.train.test_numbers import scores_of
from tests.train.test_run import train_all
from tests.train.world import link_run, losses_of, make_config, make_run
from trsr_dist.environment import Ranks
from trsr_dist.errors import ConfigError
from trsr_dist.files import read_json, sha256_of
from trsr_dist.model.artifacts import model_identity
from trsr_dist.pretrained import BaseSource, load_tokenizer
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import RunFolder
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.tables import CandidateTable, open_table, scores_folder, write_table
from trsr_dist.train.losses import distill_sum, listwise_sum
from trsr_dist.train.prepare import open_stream

NUM_STEPS, SAVED_STEP = 6, 3
LEAST = {"loss": "distill", "teacher": "RUN/base", "teacher_weight": 0.7, "teacher_temperature": 2.0}


def write_scores(run: Path, seed: int) -> CandidateTable:
    """Random scores in the base's name, of as many candidates as each sample has."""
    shards = ShardSet(run / "shards" / "train")
    folder = scores_folder(shards.folder, model_identity(str(run / "base")))
    draw = np.random.default_rng(seed)
    counts = [len(sample.candidates) for sample in shards.read_many(range(len(shards)))]
    rows = [draw.normal(0, 3, count).astype(np.float32) for count in counts]
    write_table(folder, rows, shards.manifest_hash, "score", {"seed": seed}, trained_on_these_shards=None)
    return open_table(folder, shards.manifest_hash, "")


def prepare(run: Path, source: Path, stage: int, start: Path | None = None) -> Path:
    """A run of this stage, with an early checkpoint of another run in it where one is given."""
    run.mkdir()
    (run / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (run / "base").symlink_to(source / "base")
    shutil.copytree(source / "shards", run / "shards")
    saving = {"max_steps": NUM_STEPS, "save_every_steps": SAVED_STEP}
    make_config(run, train=LEAST | saving | {"deepspeed_config": str(run / "ds.json")}, lora={"dropout": 0.1})
    if start is not None:
        name = f"step-{SAVED_STEP:06d}"
        shutil.copytree(start / "checkpoints" / name, run / "checkpoints" / name)
    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose train users a teacher has scored."""
    run = make_run(tmp_path_factory.mktemp("source"))
    write_scores(run, seed=1)
    return run


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_by_hand(seed: int) -> None:
    ours, labels, group = scores_of(seed)
    theirs = scores_of(seed + 10)[0]
    expected = 0.0
    for user in range(5):
        mine = group == user
        q, p = ((scores[mine] / 2.0).log_softmax(0) for scores in (ours, theirs))
        expected += 0.7 * 4.0 * kl_div(q, p, reduction="sum", log_target=True).item()
    expected += 0.3 * listwise_sum(ours, labels, group).item()
    assert distill_sum(ours, theirs, labels, group, 0.7, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert distill_sum(ours, theirs, labels, group, 0.0, 2.0).equal(listwise_sum(ours, labels, group))
    shifted = theirs + torch.tensor([5.0, -3.0, 0.0, 1.0, 9.0])[group]
    assert distill_sum(theirs, shifted, labels, group, 1.0, 3.0).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_answer_of_a_row_has_its_own_score(source: Path, tmp_path: Path, num_workers: int) -> None:
    run = link_run(tmp_path / "run", source)
    config = make_config(run, train=LEAST | {"num_workers": num_workers})
    builder = PromptBuilder(load_tokenizer(BaseSource(str(run / "base"))), **config.prompt.model_dump())
    stream = open_stream(config, RunFolder(run), Ranks(), builder, None)
    values = stream.teacher.values
    shards = ShardSet(run / "shards" / "train")
    expected = {
        (sample.user, candidate.item): values[index, place]
        for index, sample in enumerate(shards.read_many(range(len(shards))))
        for place, candidate in enumerate(sample.candidates)
    }
    seen = 0
    for step in islice(stream, 2 * stream.steps_in_epoch(0)):
        for row in step.rows:
            users = [row.users[number] for number in row.group]
            assert row.teacher.tolist() == [expected[key] for key in zip(users, row.items, strict=True)]
            seen += len(users)
    assert seen == 2 * 3 * len(shards)


def test_ranks_stages_and_resumption_change_no_loss_and_another_teacher_is_said(source: Path, tmp_path: Path) -> None:
    two = prepare(tmp_path / "two", source, stage=3)
    assert run_ranks(train_all, 2, [two]) == [[""], [""]]
    one, resumed = prepare(tmp_path / "one", source, 1), prepare(tmp_path / "resumed", source, 2, start=two)
    other = prepare(tmp_path / "other", source, 2, start=two)
    write_scores(other, seed=2)
    unknown = prepare(tmp_path / "unknown", source, 1)
    shutil.rmtree(next((unknown / "shards" / "train").glob("scores-*")))
    scores = [sha256_of(next((run / "shards" / "train").glob("scores-*/table.npy")))[:12] for run in (two, other)]
    found, taken, missing = run_ranks(train_all, 1, [one, resumed, other, unknown])[0][1:]
    assert not found and not taken
    expected = losses_of(two)
    assert len(expected) == NUM_STEPS and losses_of(one) == pytest.approx(expected, abs=1e-5)
    late = {step: loss for step, loss in expected.items() if step > SAVED_STEP}
    assert losses_of(resumed) == pytest.approx(late, abs=1e-5)
    assert losses_of(other) != pytest.approx(late, abs=1e-5)
    taught = [
        read_json(run / "checkpoints" / f"step-{NUM_STEPS:06d}" / "state.json")["settings"] for run in (two, other)
    ]
    assert [settings["train.teacher"] for settings in taught] == scores
    assert "not complete; run tools/score_shards.py with this config and --model RUN/base" in missing
    provenance = read_json(two / "checkpoints" / f"step-{NUM_STEPS:06d}" / "provenance.json")
    assert provenance["teacher"]["settings"] == {"seed": 1} and provenance["train"]["loss"] == "distill"


def test_a_teacher_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.teacher is empty"):
        make_config(tmp_path, train={"loss": "distill"})
