"""Two evaluations side by side, through the command."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trsr_dist.errors import DataError
from trsr_dist.evaluate.compare import open_scores, pair_users
from trsr_dist.evaluate.scores import ScoreFolder, UserScores

ROOT = Path(__file__).parents[2]


def scored(strength: float, num_users: int = 60) -> list[UserScores]:
    stream = np.random.default_rng(0)
    users = []
    for user in range(num_users):
        labels = np.eye(21, dtype=np.int64)[stream.integers(21)]
        scores = (strength * labels + stream.normal(size=21)).astype(np.float32)
        users.append(UserScores(f"u{user}", tuple(map(str, range(21))), labels, scores))
    return users


def write(folder: Path, users: list[UserScores]) -> Path:
    scores = ScoreFolder(folder)
    scores.open({"model": folder.name})
    scores.write(0, users[:30])
    scores.write(1, users[30:])
    return folder


def compare(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), *arguments, "--samples", "300"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_better_run_is_better_beyond_doubt(tmp_path: Path) -> None:
    write(tmp_path / "one" / "test" / "model", scored(3.0))
    write(tmp_path / "two" / "test" / "model", scored(0.0))
    done = compare(str(tmp_path / "one"), str(tmp_path / "two" / "test" / "model"))
    assert done.returncode == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("R@5"))
    a, b, difference, low, high, p_value = map(float, row[1:])
    assert difference == pytest.approx(a - b, abs=2e-4)
    assert 0 < low < difference < high
    assert p_value == pytest.approx(1 / 301, abs=1e-4)


def test_a_run_equals_itself(tmp_path: Path) -> None:
    path = str(write(tmp_path / "one" / "test" / "model", scored(1.0)))
    row = next(line.split() for line in compare(path, path).stdout.splitlines() if line.startswith("AUC"))
    assert row[3:] == ["+0.0000", "+0.0000", "+0.0000", "1.0000"]


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    users = scored(1.0)
    with pytest.raises(DataError, match="user 'u59' and 0 more"):
        pair_users(users, users[:-1])
    with pytest.raises(DataError, match="user 'u0' has other candidates"):
        pair_users(users, [replace(users[0], items=tuple("x" * 21)), *users[1:]])
    with pytest.raises(DataError, match="no part-"):
        open_scores(tmp_path, "test")
    assert compare(str(tmp_path), str(tmp_path)).returncode == 1
