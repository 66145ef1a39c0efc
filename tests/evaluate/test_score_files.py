"""Part files: what is written is read, what is another run's is refused, what is missing or doubled is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trsr_dist.errors import DataError, RunError
from trsr_dist.evaluate.score_files import ScoreFolder, UserScores, align

USERS = [
    UserScores("a", ("x", "y"), np.array([1, 0]), np.array([0.1, -2.5], dtype=np.float32), {"recent_dropped": 2}),
    UserScores("b", ("y", "z"), np.array([0, 1]), np.array([3e-8, 7.0], dtype=np.float32)),
]
EXPECTED = [("a", ("x", "y"), (1, 0)), ("b", ("y", "z"), (0, 1))]


def folder_of(path: Path) -> ScoreFolder:
    folder = ScoreFolder(path / "model")
    folder.open({"shards": "abc", "model": "def"}, 2, "RUN/merged")
    return folder


def test_scores_come_back_to_the_last_bit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(1, USERS[1:])
    assert folder.missing(100) == [0]
    folder.write(0, USERS[:1])
    for found, user in zip(folder.users(), USERS, strict=True):
        assert (found.user, found.items, found.trims) == (user.user, user.items, user.trims)
        assert found.scores.dtype == np.float32
        assert (found.scores == user.scores).all()
        assert (found.labels == user.labels).all()
    assert [user.user for user in folder.read(0, EXPECTED[:1])] == ["a"]


def test_scores_of_another_run_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(0, USERS)
    folder.open({"shards": "abc", "model": "def"}, 99, "elsewhere")
    with pytest.raises(RunError, match="model='def', now 'other'"):
        folder.open({"shards": "abc", "model": "other"}, 2, "")
    (folder.folder / "identity.json").unlink()
    with pytest.raises(RunError, match="no identity.json"):
        folder.open({"shards": "abc", "model": "def"}, 2, "")
    folder.clear()
    folder.open({"shards": "abc", "model": "other"}, 2, "")
    assert folder.missing(1) == [0]


def test_a_folder_that_changed_hands_is_neither_written_nor_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(0, USERS)
    folder_of(tmp_path).clear()
    with pytest.raises(RunError, match="model=None, now 'def'"):
        folder.write(1, USERS)
    ScoreFolder(folder.folder).open({"shards": "abc", "model": "other"}, 2, "")
    with pytest.raises(RunError, match="model='other', now 'def'"):
        folder.write(1, USERS)
    with pytest.raises(RunError, match="model='other', now 'def'"):
        folder.check()
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
        align(Path("part"), EXPECTED, found)


def test_lines_in_another_order_are_put_in_order() -> None:
    swapped = replace(USERS[1], items=("z", "y"), labels=np.array([1, 0]), scores=USERS[1].scores[::-1])
    first, second = align(Path("part"), EXPECTED, [swapped, USERS[0]])
    assert (first.user, second.user, second.items) == ("a", "b", ("y", "z"))
    assert (second.scores == USERS[1].scores).all()


def test_texts_come_back_as_they_are(tmp_path: Path) -> None:
    """Also those that look like dates."""
    folder = folder_of(tmp_path)
    dates = replace(USERS[0], user="2019-11-11 09:05:58", items=("2020-01-01", "\u2028 \u00fc"))
    folder.write(0, [dates, USERS[1]])
    folder.write(1, [USERS[0]])
    assert [(user.user, user.items, user.trims) for user in folder.users()] == [
        (user.user, user.items, user.trims) for user in (dates, USERS[1], USERS[0])
    ]


def test_files_that_are_no_parts_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(0, USERS)
    folder.check_names(2)
    folder.write(1, USERS)
    with pytest.raises(DataError, match=r"part-000001.jsonl: no part of this evaluation, which has 1 of 2 users"):
        folder.check_names(2)
    with pytest.raises(DataError, match=r"part-000005.jsonl: missing"):
        folder.read(5, EXPECTED)


def test_a_damaged_part_names_file_and_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write(0, USERS)
    with open(folder.path(0), "a") as stream:
        stream.write('{"user": "c", "item"')
    with pytest.raises(DataError, match="part-000000.jsonl:5: not a score"):
        list(folder.users())
    folder.path(0).write_text('{"user": "c", "item": "x", "label": 1}\n')
    with pytest.raises(DataError, match="part-000000.jsonl:1: not a score .score: field required"):
        list(folder.users())
