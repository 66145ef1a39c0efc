"""A disk that is full or cannot be written: a clear error, nothing half-written, and the work goes on later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import FULL, mounted_disk, remount, used_kib
from tests.summarize.world import run_here, tree_hash, write_config, write_histories
from trsr_dist.errors import RunError

USERS = {"train": 60, "valid": 8, "test": 8}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards of a disk with room."""
    run = tmp_path_factory.mktemp("roomy") / "run"
    write_histories(run, USERS)
    run_here(write_config(run))
    return tree_hash(run / "shards")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate disk in memory, that can be made smaller, larger and read-only."""
    with mounted_disk(tmp_path / "disk", "64m") as folder:
        yield folder


def prepared(disk: Path) -> tuple[Path, Path]:
    run = disk / "run"
    write_histories(run, USERS)
    return run, write_config(run)


@pytest.mark.parametrize("room_kib", [16, 40, 100, 200, 400])
def test_a_full_disk(disk: Path, expected: dict[str, str], room_kib: int) -> None:
    """It fills up in the journal, in a unit or while a set is published."""
    run, config = prepared(disk)
    remount(disk, f"size={used_kib(disk) + room_kib}k")
    with pytest.raises(RunError, match=FULL):
        run_here(config)
    assert set(tree_hash(run / "shards").items()) <= set(expected.items())
    assert not list(run.glob("summaries/work/*/attempts/*")) and not list(run.glob("summaries/work/*/set-*"))
    remount(disk, "size=64m")
    run_here(config)
    assert tree_hash(run / "shards") == expected


def test_a_disk_that_cannot_be_written(disk: Path, expected: dict[str, str]) -> None:
    run, config = prepared(disk)
    before = tree_hash(run)
    remount(disk, "ro")
    with pytest.raises(RunError, match="Read-only file system; get permission to write there"):
        run_here(config)
    remount(disk, "rw")
    assert tree_hash(run) == before
    run_here(config)
    assert tree_hash(run / "shards") == expected


def test_shards_on_another_disk_are_refused_before_the_work(disk: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_histories(run, USERS)
    (disk / "shards").mkdir()
    (run / "shards").symlink_to(disk / "shards")
    with pytest.raises(RunError, match="shards: on another file system than .*summaries"):
        run_here(write_config(run))
    assert not list(run.glob("summaries/journal/*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_to_write(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_histories(run, USERS)
    config = write_config(run)
    run.chmod(0o555)
    try:
        with pytest.raises(RunError, match="Permission denied; get permission to write in"):
            run_here(config)
    finally:
        run.chmod(0o755)
    assert [path.name for path in run.iterdir()] == ["histories"]
