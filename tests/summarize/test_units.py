"""Units and their commit: the first one counts, and a set is published whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.summarize.world import tree_hash
from trsr_dist import leases
from trsr_dist.errors import DataError
from trsr_dist.files import read_json
from trsr_dist.leases import LeaseFolder
from trsr_dist.liveness import Owner
from trsr_dist.records import Candidate, Sample
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize.units import SplitWork
from trsr_dist.summarize.worker import Worker


def samples(work: SplitWork, unit: int, summary: str = "likes tennis") -> list[Sample]:
    return [Sample(f"u{i}", "say", summary, ("a",), (Candidate("x", "t", 1),), {}) for i in work.users(unit)]


def opened(folder: Path, users: int = 10) -> SplitWork:
    work = SplitWork(folder / "work" / "train-abc", "train", users, 4)
    work.open()
    return work


def commit(work: SplitWork, unit: int, task: str = "t", **options: str) -> bool:
    facts = {"num_users": len(work.users(unit)), "failed": [], "counts": {}}
    return work.commit(unit, samples(work, unit, **options), facts, task)


def summaries(folder: Path) -> set[str]:
    shards = ShardSet(folder / "shards" / "train")
    return {sample.summary for sample in shards.read_many(range(len(shards)))}


def publish(work: SplitWork, folder: Path, task: str = "t") -> bool:
    return work.publish(folder / "shards" / "train", task, {"a": 1}, {})


def test_units_cover_every_user_once(tmp_path: Path) -> None:
    for users in range(1, 20):
        work = SplitWork(tmp_path, "train", users, 4)
        assert [user for unit in range(work.num_units) for user in work.users(unit)] == list(range(users))


def test_the_first_commit_counts_whoever_comes_late(tmp_path: Path) -> None:
    work = opened(tmp_path)
    assert commit(work, 1, "early") and not commit(work, 1, "late", summary="other")
    assert work.is_done(1) and not work.is_done(0) and not work.is_complete()
    assert list((work.folder / "attempts").iterdir()) == []
    for unit in (0, 2):
        assert commit(work, unit)
    assert publish(work, tmp_path)
    assert summaries(tmp_path) == {"likes tennis"}


def test_a_task_without_work_reads_few_leases_at_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of them would read the leases of a thousand others every few seconds."""
    work = SplitWork(tmp_path / "work" / "train-abc", "train", 300, 1)
    work.open()
    others, mine = (LeaseFolder(tmp_path / "leases", Owner("elsewhere", task=name), 100.0) for name in ("a", "b"))
    held = [others.acquire(f"train-abc-{unit:06d}") for unit in range(300)]
    read, plain_read = [], leases.read_sign
    monkeypatch.setattr(leases, "read_sign", lambda path: read.append(path) or plain_read(path))
    worker = Worker(None, [work], mine, None, "b", 0.3, lambda: None)
    for _ in range(5):
        worker._last_scan = float("-inf")
        assert worker._claim() is None
    assert 300 <= len(read) <= 350
    assert len(set(read)) == 300, "each of them in its turn"
    others.release(held[250])
    worker._last_scan = float("-inf")
    assert worker._claim().unit == 250, "a free one is seen at once"
    for folder in (mine, others):
        folder.close()


def test_one_look_finds_what_all_tasks_have_committed(tmp_path: Path) -> None:
    work, other = opened(tmp_path), opened(tmp_path)
    assert work.committed() == set()
    commit(other, 1)
    (work.folder / "units" / ".nfs0001").mkdir()
    assert work.committed(max_age_seconds=1000) == set() and work.is_done(1)
    commit(work, 0, "another")
    assert work.committed(max_age_seconds=1000) == {0, 1} == other.committed()
    commit(other, 2)
    assert work.is_complete() and work.committed(max_age_seconds=1000) == {0, 1, 2}


def test_a_published_set_is_replaced_whole(tmp_path: Path) -> None:
    work = opened(tmp_path)
    for unit in range(work.num_units):
        commit(work, unit)
    publish(work, tmp_path)
    work.clear()
    work = opened(tmp_path)
    for unit in range(work.num_units):
        commit(work, unit, summary="other")
    publish(work, tmp_path)
    assert summaries(tmp_path) == {"other"}


def test_two_publishers_make_one_set(tmp_path: Path) -> None:
    works = opened(tmp_path), opened(tmp_path)
    for unit in range(works[0].num_units):
        commit(works[0], unit)
    assert publish(works[0], tmp_path, "one")
    before = tree_hash(tmp_path / "shards")
    publish(works[1], tmp_path, "two")
    works[1].clear()
    works[0].clear()
    assert tree_hash(tmp_path / "shards") == before
    assert not works[0].folder.exists()


def test_a_task_that_comes_after_the_clearing_passes(tmp_path: Path) -> None:
    early, late = opened(tmp_path), opened(tmp_path)
    for unit in range(early.num_units):
        commit(early, unit)
    publish(early, tmp_path)
    early.clear()
    assert late.is_complete() and not commit(late, 0, "late")
    assert not publish(late, tmp_path, "late")
    with pytest.raises(DataError):
        late.facts(0)


def test_failures_are_those_of_committed_units(tmp_path: Path) -> None:
    work = opened(tmp_path)
    failure = {"user": "u4", "node": 0, "key": "k", "reason": "refused"}
    assert work.failures() == []
    work.commit(1, samples(work, 1), {"num_users": 4, "failed": [failure], "counts": {}}, "t")
    assert work.failures() == [failure]
    early, late = opened(tmp_path), opened(tmp_path)
    assert early.failures() == [failure]
    work.clear()
    assert early.failures() == [failure] and late.failures() == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV])
def test_file_systems_without_hard_links_get_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_link(*args: object, **kwargs: object) -> None:
        raise OSError(number, "not here")

    monkeypatch.setattr(os, "link", no_link)
    work = opened(tmp_path)
    for unit in range(work.num_units):
        commit(work, unit)
    assert publish(work, tmp_path)
    assert read_json(tmp_path / "shards/train/manifest.json")["num_samples"] == 10
