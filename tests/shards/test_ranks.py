"""The stream under real process groups: equal steps, equal gradients, measured lengths shared."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.shards.world import flip_byte, make_builder, make_split
from tests.spawn import run_ranks
from trsr_dist.rows import PackedRow
from trsr_dist.shards.measure import Share
from trsr_dist.shards.plan import PackingSettings
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.stream import TrainStream

SETTINGS = PackingSettings(row_tokens=500, rows_per_step=3, negatives_per_positive=1, seed=1)
SIZES = (33, 2, 20)
DAMAGED = 4


def train_epoch(rank: int, world_size: int, folder: Path, max_data_errors: int | None) -> dict[str, object]:
    """Toy training with one collective a step: hangs unless every rank makes equally many steps."""
    stream = TrainStream(ShardSet(folder), make_builder(), SETTINGS, Share(rank, world_size), max_data_errors)
    weight = torch.full((), 0.1, dtype=torch.float64)
    users: list[str] = []
    num_rows: list[int] = []
    num_errors = 0
    for step in islice(stream, stream.steps_in_epoch(0)):
        gradient = sum((_gradient(weight, row) for row in step.rows), torch.zeros((), dtype=torch.float64))
        dist.all_reduce(gradient)
        weight = weight - 0.5 * gradient / step.num_answers
        users += [user for row in step.rows for user in row.users]
        num_rows.append(len(step.rows))
        num_errors += len(step.errors)
    return {"weight": float(weight), "users": users, "num_rows": num_rows, "errors": num_errors}


def _gradient(weight: torch.Tensor, row: PackedRow) -> torch.Tensor:
    """Of the summed logistic loss of a model that looks at the answers' positions."""
    weight = weight.clone().requires_grad_()
    logits = weight * torch.from_numpy(np.log1p(row.answer_index))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(row.labels).double())
    (loss * row.num_answers if row.num_answers else 0.0 * weight).backward()
    return weight.grad


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_split(tmp_path_factory.mktemp("split") / "train", SIZES).folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, object]:
    return run_ranks(train_epoch, 1, folder, None)[0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gradients_equal_those_of_one_process(folder: Path, alone: dict, world_size: int) -> None:
    ranks = run_ranks(train_epoch, world_size, folder, None)
    assert all(rank["num_rows"] == ranks[0]["num_rows"] for rank in ranks)
    assert sorted(user for rank in ranks for user in rank["users"]) == sorted(alone["users"])
    assert len(set(alone["users"])) == len(alone["users"]) == sum(SIZES)
    for rank in ranks:
        assert rank["weight"] == pytest.approx(alone["weight"], abs=1e-9)


def test_ranks_measure_together_and_stay_in_step_when_samples_are_damaged(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", SIZES)
    TrainStream(shards, make_builder(), SETTINGS)  # measures while all is well
    flip_byte(shards.path(0), int(shards.shard(0).rows[DAMAGED]["offset"]) + 3)
    ranks = run_ranks(train_epoch, 3, shards.folder, 100)
    assert sum(rank["errors"] for rank in ranks) == 1
    assert sorted(user for rank in ranks for user in rank["users"]) == sorted(
        f"user/{number}" for number in range(sum(SIZES)) if number != DAMAGED
    )
    assert len({rank["weight"] for rank in ranks}) == 1


def measure_only(rank: int, world_size: int, folder: Path) -> int:
    return TrainStream(
        ShardSet(folder), make_builder(), SETTINGS, Share(rank, world_size)
    ).plan.lengths.facts.num_samples


def test_ranks_share_the_measuring(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", SIZES)
    assert run_ranks(measure_only, 3, shards.folder) == [sum(SIZES)] * 3
    together = [path.read_bytes() for path in sorted(shards.folder.glob("lengths-*/*"))]
    one = make_split(tmp_path / "alone" / "train", SIZES)
    measure_only(0, 1, one.folder)
    assert together == [path.read_bytes() for path in sorted(one.folder.glob("lengths-*/*"))]
