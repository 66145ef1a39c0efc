"""Killed at each step of replacing a folder or a file: the old or the new one is there, whole, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kills import killed_at_every_change
from trsr_dist.files import atomic_file, atomic_folder, recover_folder
from trsr_dist.locks import folder_lock


def write(folder: Path, text: str) -> None:
    with folder_lock(folder) as lock, atomic_folder(folder, lock.check) as inside:
        (inside / "sub").mkdir()
        for name in ("a", "sub/b"):
            (inside / name).write_text(text)


def read(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "sub/b")}


@pytest.mark.parametrize("name", ["out", "out[v2]*"])
def test_a_folder(tmp_path: Path, name: str) -> None:
    """The next process that takes the lock finds one whole folder, removes what is left, and can replace it."""
    folder = tmp_path / name
    texts = ["0"]
    write(folder, "0")
    missing = []
    for change in killed_at_every_change(lambda: write(folder, f"{len(texts)}"), f"{tmp_path}/.*"):
        missing += [change] * (not folder.exists())
        texts.append(f"{len(texts)}")
        with folder_lock(folder):
            assert read(folder) in ({texts[-2]}, {texts[-1]}), change
            assert {path.name for path in tmp_path.iterdir()} == {name, f".{name}.lock"}, change
        write(folder, texts[-1])
    assert len(missing) == 1, "between the two renames there is no folder of the name"


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def replace() -> None:
        with atomic_file(path) as stream:
            stream.write("new")

    for _ in killed_at_every_change(replace, f"{tmp_path}/.*"):
        assert path.read_text() in ("old", "new")
    assert path.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "the next process has removed what was left"


def test_of_two_that_were_moved_aside_the_later_one_comes_back(tmp_path: Path) -> None:
    for number in (3, 9, 5):
        old = tmp_path / f".out.old-host-{number}"
        old.mkdir()
        (old / "text").write_text(f"{number}")
        for path in (old / "text", old):
            os.utime(path, (1000 + number,) * 2)
    recover_folder(tmp_path / "out")
    assert (tmp_path / "out" / "text").read_text() == "9"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
