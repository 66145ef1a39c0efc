"""Before the first step that learns: every adapter must have received a gradient."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.shards.world import make_sample, write_split
from tests.spawn import run_ranks
from tests.train.world import link_run, make_run, start
from trsr_dist.train.engine import Engine

LISTWISE = {"loss": "listwise", "row_tokens": 1024}


def start_both(rank: int, world_size: int, run: Path, without_negatives: Path) -> tuple[str, str]:
    found = start(without_negatives, train=LISTWISE)
    backward = Engine.backward
    Engine.backward = lambda engine, loss: backward(engine, loss * torch.zeros(()))  # as if the graph were cut
    return found, start(run, train=LISTWISE)


def test_a_step_without_a_loss_says_nothing_of_the_adapters(tmp_path: Path) -> None:
    """Users without negatives have a listwise loss of 0, as damaged ones that are left out do."""
    run = make_run(tmp_path / "run", num_users=24)
    without_negatives = link_run(tmp_path / "without", run)
    (without_negatives / "shards").unlink()
    for split, first in (("train", 0), ("valid", 1000)):
        samples = [make_sample(first + number, num_negatives=0) for number in range(24)]
        write_split(without_negatives / "shards" / split, samples, [24], split)
    found, cut = run_ranks(start_both, 1, run, without_negatives)[0]
    assert found == "0"
    assert cut.startswith("ModelError") and "LoRA layers received no gradient" in cut
