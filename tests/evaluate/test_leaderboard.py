"""Several runs in one table, read back from what the commands write."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.evaluate.world import numbers_of
from tests.spawn import run_script
from trsr_dist.config import load_config
from trsr_dist.errors import DataError
from trsr_dist.evaluate.leaderboard import markdown, read_entries


@pytest.fixture
def folder(run: Path, alone: Path, tmp_path: Path) -> Path:
    """A run folder: the evaluation where it usually lies, popularity under a rival's name, and the log of a training
    that was interrupted once."""
    made = tmp_path / "one"
    shutil.copytree(alone / "config", made / "config")
    (made / "evaluation").mkdir()
    results = (alone / "test.json").read_text().replace('"popularity"', '"bm25"')
    (made / "evaluation" / "test.json").write_text(results)
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    for step, seconds in ((10, 0), (20, 60), (30, 120), (40, 9000), (50, 9060)):
        rates = {"train/tokens_per_second": 80.0, "train/users_per_second": 0.2}
        rows.append({"stage": "train", "step": step, "time": 1e9 + seconds, **rates})
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_a_row_has_the_results_and_the_costs(run: Path, alone: Path, folder: Path) -> None:
    (entry,) = read_entries(folder, load_config(run / "config.yaml"), "test")
    results = numbers_of(alone)
    assert entry.metric == "recall@3" and entry.systems["model"] == results["metrics"]
    assert entry.systems["bm25"] == results["baselines"]["popularity"]
    assert entry.gain == results["personalization_gain"]["recall@3"]
    assert entry.against["bm25"] == results["differences"]["popularity"]["recall@3"]
    assert entry.tokens_per_user == pytest.approx(400)
    assert entry.num_steps == 50 and entry.settings == {}
    assert entry.train_hours == pytest.approx(180 / 3600), "the night without a node is no work"


def test_the_command_writes_both_files(run: Path, folder: Path, tmp_path: Path) -> None:
    other, output = shutil.copytree(folder, tmp_path / "two"), tmp_path / "table"
    text = (run / "config.yaml").read_text().replace("recent_items: 2", "recent_items: 5")
    (tmp_path / "shared.yaml").write_text(text)
    done = run_script("tools/leaderboard.py", folder, other, "--config", tmp_path / "shared.yaml", "--output", output)
    assert done.returncode == 0, done.stderr
    table = output.with_suffix(".md").read_text()
    assert table.count("## demo, negatives: targets") == 1, "equal candidate lists share a table"
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert [row.split("|")[1].strip() for row in rows[-2:]] == ["one", "two"]
    assert sum(row.startswith("| BM25") for row in rows) == 1
    assert "* `one`: `prompt.recent_items=2`" in table
    runs = json.loads(output.with_suffix(".json").read_text())["runs"]
    assert [entry["run"] for entry in runs] == ["one", "two"]
    shutil.rmtree(other)
    earlier = ["tools/leaderboard.py", output.with_suffix(".json"), "--config", tmp_path / "shared.yaml"]
    done = run_script(*earlier, "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.json").read_text() == output.with_suffix(".json").read_text()
    done = run_script("tools/leaderboard.py", folder / "evaluation/test.json", *earlier[2:], "--output", tmp_path / "x")
    assert done.returncode == 1 and "evaluation/test.json: runs: field required" in done.stderr


def test_baselines_that_differ_between_runs_have_a_row_each(run: Path, folder: Path, tmp_path: Path) -> None:
    """Runs of equal candidates may have other histories, so another BM25; and another model is a setting."""
    other = shutil.copytree(folder, tmp_path / "two")
    results = json.loads((other / "evaluation" / "test.json").read_text())
    results["baselines"]["bm25"]["recall@1"] = 0.5
    (other / "evaluation" / "test.json").write_text(json.dumps(results))
    config = other / "config" / "evaluate.yaml"
    config.write_text(re.sub(r"name_or_path: \S+", "name_or_path: /models/Other-1B", config.read_text()))
    shared = load_config(run / "config.yaml")
    entries = [entry for place in (folder, other) for entry in read_entries(place, shared, "test")]
    table = markdown(entries, "# Head")
    assert "| BM25 (one) |" in table and "| BM25 (two) | 0.5000 |" in table and "| random |" in table
    assert "* `two`: `model.name_or_path=other-1b`" in table


def test_a_run_without_results_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none/evaluation/test.json: not there; run tools/evaluate.py"):
        read_entries(tmp_path / "none", load_config(run / "config.yaml"), "test")
