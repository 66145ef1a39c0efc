"""Two evaluations side by side."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trsr_dist.errors import DataError
from trsr_dist.evaluate.compare import compare
from trsr_dist.evaluate.passes import split_parts
from trsr_dist.evaluate.score_files import ScoreFolder, UserScores

ROOT = Path(__file__).parents[2]
NUM_USERS = 130


def scored(strength: float) -> list[UserScores]:
    stream = np.random.default_rng(0)
    users = []
    for user in range(NUM_USERS):
        labels = np.eye(21, dtype=np.int64)[stream.integers(21)]
        scores = (strength * labels + stream.normal(size=21)).astype(np.float32)
        users.append(UserScores(f"u{user}", tuple(map(str, range(21))), labels, scores))
    return users


def write(folder: Path, users: list[UserScores]) -> Path:
    scores = ScoreFolder(folder)
    scores.open({"model": "abc"}, len(users), f"RUN/{folder.parts[-3]}")
    for number, part in enumerate(split_parts(len(users))):
        scores.write(number, users[part.start : part.stop])
    return folder


@pytest.fixture
def one(tmp_path: Path) -> Path:
    write(tmp_path / "one" / "test" / "model", scored(3.0))
    return tmp_path / "one"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write(tmp_path / "two" / "test" / "model", scored(0.0))
    return tmp_path / "two"


def table(one: Path, two: Path, split: str = "test", unfinished: bool = False) -> dict[str, list[str]]:
    """The lines of the comparison by their first word."""
    lines = compare((one, two), split, (3, 5), 300, 0, unfinished).splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_the_better_run_is_better_beyond_doubt(one: Path, two: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), str(one), str(two / "test" / "model")]
    done = subprocess.run([*command, "--samples", "300"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heads = done.stdout.splitlines()[:2]
    assert heads[0] == f"A: {one / 'test' / 'model'} (model RUN/one)"
    assert heads[1] == f"B: {two / 'test' / 'model'} (model RUN/two)"
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("R@5"))
    a, b, difference, low, high, p_value = map(float, row[1:])
    assert difference == pytest.approx(a - b, abs=2e-4)
    assert 0 < low < difference < high
    assert p_value == pytest.approx(1 / 301, abs=1e-4)


def test_a_run_equals_itself(one: Path) -> None:
    assert table(one, one)["AUC"][2:] == ["+0.0000", "+0.0000", "+0.0000", "1.0000"]


def test_an_unfinished_evaluation_is_compared_only_where_asked(one: Path, two: Path) -> None:
    ScoreFolder(one / "test" / "model").path(1).unlink()
    with pytest.raises(DataError, match=r"one/test/model: 66 of 130 users are scored \(parts 1 missing\)"):
        table(one, two)
    assert table(one, two, unfinished=True)["66"] == ["users,", "300", "resamples"]
    shutil.rmtree(two / "test" / "model")
    write(two / "test" / "model", scored(0.0)[64:128])
    with pytest.raises(DataError, match="no user stands in both"):
        table(one, two, unfinished=True)


def test_what_cannot_be_paired_is_refused(one: Path, two: Path, tmp_path: Path) -> None:
    users = scored(0.0)
    fewer = write(tmp_path / "fewer" / "test" / "model", users[:-1])
    with pytest.raises(DataError, match="user 'u129' and 0 more"):
        table(one, fewer)
    changed = [replace(users[0], items=tuple("x" * 21)), *users[1:]]
    with pytest.raises(DataError, match="user 'u0' has other candidates"):
        table(one, write(tmp_path / "changed" / "test" / "model", changed))
    with pytest.raises(DataError, match="user 'u0' is scored twice"):
        table(one, write(tmp_path / "doubled" / "test" / "model", [*users, users[0]]))
    with pytest.raises(DataError, match="no part-"):
        table(tmp_path, tmp_path)
    with pytest.raises(DataError, match="the users of test, and --split is valid; add --split test"):
        table(one / "test", two, "valid")


@pytest.mark.parametrize(
    "scores, label, message",
    [
        (np.nan, 1, "user 'u0', item '0': score nan is not finite"),
        (0.5, 0, "user 'u0': no positive among 2 candidates"),
    ],
)
def test_users_without_a_metric_are_refused(one: Path, tmp_path: Path, scores: float, label: int, message: str) -> None:
    users = scored(3.0)
    users[0] = UserScores("u0", ("0", "1"), np.array([label, 0]), np.array([scores, 1.0], np.float32))
    write(tmp_path / "two" / "test" / "model", users)
    with pytest.raises(DataError, match=message):
        table(one, tmp_path / "two")


def test_scores_of_before_the_facts_were_recorded_are_compared(one: Path, two: Path) -> None:
    (one / "test" / "model" / "identity.json").write_text('{"model": "0123456789abcdef"}')
    assert compare((one, two), "test", (3,), 10, 0).splitlines()[0].endswith("(model 0123456789ab)")
