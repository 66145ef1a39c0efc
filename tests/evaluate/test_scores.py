"""Part files: what is written is read, what is another run's is refused, what is missing or doubled is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trsr_dist.errors import DataError, RunError
from trsr_dist.evaluate.scores import ScoreFolder, UserScores, check_coverage

USERS = [
    UserScores("a", ("x", "y"), np.array([1, 0]), np.array([0.1, -2.5], dtype=np.float32), {"recent_dropped": 2}),
    UserScores("b", ("y", "z"), np.array([0, 1]), np.array([3e-8, 7.0], dtype=np.float32)),
]
EXPECTED = [("a", ("x", "y"), (1, 0)), ("b", ("y", "z"), (0, 1))]


def folder_of(path: Path) -> ScoreFolder:
    folder = ScoreFolder(path / "model")
    folder.open({"shards": "abc", "model": "def"})
    return folder


def test_scores_come_back_to_the_last_bit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(1, USERS[1:])
    assert folder.missing(2) == [0]
    folder.write(0, USERS[:1])
    for found, user in zip(folder.read(), USERS, strict=True):
        assert (found.user, found.items, found.trims) == (user.user, user.items, user.trims)
        assert found.scores.dtype == np.float32
        assert (found.scores == user.scores).all()
        assert (found.labels == user.labels).all()
    check_coverage(Path("scores"), EXPECTED, folder.read())


def test_scores_of_another_run_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(0, USERS)
    folder.open({"shards": "abc", "model": "def"})
    with pytest.raises(RunError, match="model='def', now 'other'"):
        folder.open({"shards": "abc", "model": "other"})
    (folder.folder / "identity.json").unlink()
    with pytest.raises(RunError, match="no identity.json"):
        folder.open({"shards": "abc", "model": "def"})
    folder.clear()
    folder.open({"shards": "abc", "model": "other"})
    assert folder.missing(1) == [0]


def test_a_folder_that_changed_hands_is_neither_written_nor_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(0, USERS)
    folder_of(tmp_path).clear()
    with pytest.raises(RunError, match="model=None, now 'def'"):
        folder.write(1, USERS)
    ScoreFolder(folder.folder).open({"shards": "abc", "model": "other"})
    with pytest.raises(RunError, match="model='other', now 'def'"):
        folder.write(1, USERS)
    with pytest.raises(RunError, match="model='other', now 'def'"):
        folder.read()
    assert not list(folder.folder.glob("part-*"))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (USERS[:1], r"2 of 4 .*missing \(\('b', 'y', 0\), \('b', 'z', 1\)\)"),
        ([*USERS, USERS[0]], r"2 doubled \(\('a', 'x', 1\), \('a', 'y', 0\)\)"),
        ([USERS[0], replace(USERS[1], items=("y", "q"))], r"1 unknown \(\('b', 'q', 1\)\)"),
        ([USERS[0], replace(USERS[1], labels=np.array([1, 0]))], r"2 of 4 .*missing \(\('b', 'y', 0\)"),
    ],
)
def test_coverage_names_what_is_wrong(found: list[UserScores], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_coverage(Path("scores"), EXPECTED, found)


def test_a_damaged_part_names_file_and_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(0, USERS)
    with open(folder.path(0), "a") as stream:
        stream.write('{"user": "c", "item"')
    with pytest.raises(DataError, match="part-000000.jsonl:5: not a score"):
        folder.read()
