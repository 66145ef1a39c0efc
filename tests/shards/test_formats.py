"""Shards are plain WebDataset; equal samples give equal bytes; evaluation rows cover every candidate once."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset as wds

from tests.shards.world import flip_byte, make_builder, make_sample, make_split, write_split
from trsr_dist.errors import DataError
from trsr_dist.shards.evaluation import EvaluationPlan
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.writer import write_shard


def test_webdataset_and_tar_read_the_shards(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (7, 4))
    urls = [str(shards.path(number)) for number in range(2)]
    read = [entry["json"] for entry in wds.WebDataset(urls, shardshuffle=False).decode()]
    assert [entry["user"] for entry in read] == [f"user/{number}" for number in range(11)]
    with tarfile.open(urls[0]) as tar:
        members = [json.loads(tar.extractfile(member).read()) for member in tar]
    assert [member["user"] for member in members] == [f"user/{number}" for number in range(7)]


def test_any_sample_by_its_number(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (3, 1, 4))
    assert shards.read_many([7, 0, 3, 4]) == [make_sample(number) for number in (7, 0, 3, 4)]
    assert shards.read(5, (1, 0)).candidates == make_sample(5).candidates[1::-1]
    assert shards.sizes(2, 6).shape == (4,)
    with pytest.raises(IndexError):
        shards.read(8)


def test_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    facts = [write_shard(tmp_path / name / "train-000000.tar", map(make_sample, range(5))) for name in "ab"]
    assert facts[0] == facts[1]
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_shard_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="user 'user/1' stands twice"):
        write_shard(tmp_path / "train-000000.tar", [make_sample(0), make_sample(1), make_sample(1)])
    assert not list(tmp_path.iterdir())


def test_candidate_hash_sees_candidates_only(tmp_path: Path) -> None:
    splits = [make_split(tmp_path / name, (4, 3)) for name in "ab"]
    other = write_split(tmp_path / "c", [make_sample(number, 5) for number in range(7)], (4, 3))
    assert splits[0].candidate_hash == splits[1].candidate_hash != other.candidate_hash


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_rows_cover_every_candidate_once(tmp_path: Path, world_size: int) -> None:
    shards = make_split(tmp_path / "valid", (20, 13))
    plan = EvaluationPlan(shards, make_builder(), row_tokens=500)
    assigned = [plan.assign(rank, world_size) for rank in range(world_size)]
    assert {plan.num_forwards(world_size) - len(rows) for rows in assigned} <= {0, 1}
    rows = [plan.read_row(row) for hand in assigned for row in hand]
    answers = Counter(
        (row.users[group], item) for row in rows for group, item in zip(row.group, row.items, strict=True)
    )
    expected = {(sample.user, c.item) for sample in shards.read_many(range(33)) for c in sample.candidates}
    assert set(answers) == expected and set(answers.values()) == {1}
    assert all(row.num_tokens <= 500 for row in rows)


def test_evaluation_of_the_first_users(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "valid", (20, 13))
    plan = EvaluationPlan(shards, make_builder(), row_tokens=2000, max_users=5)
    users = {user for row in range(len(plan.rows)) for user in plan.read_row(row).users}
    assert users == {f"user/{number}" for number in range(5)}


def test_evaluation_stops_at_a_damaged_sample(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "valid", (5,))
    EvaluationPlan(shards, make_builder(), row_tokens=2000)
    flip_byte(shards.path(0), int(shards.shard(0).rows[1]["offset"]) + 5)
    plan = EvaluationPlan(ShardSet(shards.folder), make_builder(), row_tokens=2000)
    with pytest.raises(DataError, match="sample 1 .*checksum"):
        [plan.read_row(row) for row in range(len(plan.rows))]
