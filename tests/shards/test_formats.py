"""Shards are plain WebDataset; equal samples give equal bytes."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from tests.shards.world import make_sample, make_split, write_split
from trsr_dist.errors import DataError
from trsr_dist.files import read_json, write_json
from trsr_dist.prompts.text import WORDING_VERSION
from trsr_dist.shards import index
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


def test_few_arrays_are_opened_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "KEPT_BYTES", 80)
    opened = []
    kept = index.KeptArrays(lambda number: opened.append(number) or np.full(4, number))
    for number in (0, 1, 0, 2, 0, 1, 2, 1):
        assert kept(number).tolist() == [number] * 4
    assert opened == [0, 1, 2, 1, 2], "two fit, the last used stay"


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


def test_shards_of_older_prompts_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_split(tmp_path / "train", (3,)).folder
    manifest = read_json(folder / "manifest.json")
    for version, fits in ((WORDING_VERSION, True), (WORDING_VERSION - 1, False)):
        write_json(folder / "manifest.json", manifest | {"settings": {"wording": version}})
        if fits:
            assert len(ShardSet(folder)) == 3
            continue
        with pytest.raises(DataError, match=rf"train: .* version {version}, now .* {WORDING_VERSION}; .*--force"):
            ShardSet(folder)
        assert len(ShardSet(folder, any_wording=True)) == 3, "for those that only look"
