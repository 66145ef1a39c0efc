"""Several runs in one table, read back from what the commands write."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.world import ROOT, numbers_of
from tests.spawn import run_script
from trsr_dist.config import dump_config, load_config
from trsr_dist.errors import DataError
from trsr_dist.evaluate.leaderboard import Entry, gather_entries, markdown, read_entries
from trsr_dist.files import read_json, write_json


@pytest.fixture
def folder(run: Path, alone: Path, tmp_path: Path) -> Path:
    """A run folder: the evaluation of step 7 where it usually lies, popularity under a rival's name, and the log of a
    training that was interrupted once and went on to step 9."""
    made = tmp_path / "one"
    shutil.copytree(alone / "config", made / "config")
    (made / "evaluation" / "test").mkdir(parents=True)
    shutil.copy(alone / "test" / "manifest.json", made / "evaluation" / "test")
    results = (alone / "test.json").read_text().replace('"popularity"', '"bm25"')
    (made / "evaluation" / "test.json").write_text(results)
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    for step, seconds in ((1, 0), (2, 60), (3, 120), (4, 9000), (7, 9060), (9, 9120)):
        rates = {"train/tokens_per_second": 80.0, "train/users_per_second": 0.2}
        rows.append({"stage": "train", "step": step, "time": 1e9 + seconds, **rates})
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def change(folder: Path, **values: Any) -> None:
    """Other values in the results of a run."""
    path = folder / "evaluation" / "test.json"
    write_json(path, read_json(path) | values)


def entry_of(run: Path, folder: Path) -> Entry:
    (entry,) = read_entries(folder, load_config(run / "config.yaml"), "test")
    return entry


def test_a_row_has_the_results_and_the_costs(run: Path, alone: Path, folder: Path) -> None:
    entry, results = entry_of(run, folder), numbers_of(alone)
    assert entry.metric == "recall@3" and entry.systems["model"] == results["metrics"]
    assert entry.systems["bm25"] == results["baselines"]["popularity"]
    assert entry.gain == results["personalization_gain"]["recall@3"]
    assert entry.against["bm25"] == results["differences"]["popularity"]["recall@3"]
    assert entry.tokens_per_user == pytest.approx(400)
    assert entry.num_steps == 7 and entry.settings == {}
    assert entry.train_hours == pytest.approx(180 / 3600), "the night without a node is no work"


def test_a_row_tells_of_the_model_and_the_split_that_were_evaluated(run: Path, folder: Path) -> None:
    """Since then the run was trained further and its validation users were evaluated, with other settings."""
    before, config = entry_of(run, folder), folder / "config" / "evaluate.yaml"
    later = ["prompt.recent_items=3", "train.learning_rate=0.5", "evaluate.row_tokens=999", "evaluate.top_k=[1, 2, 9]"]
    config.write_text(dump_config(load_config(config, [*later, "evaluate.split=valid"])))
    with open(folder / "metrics.jsonl", "a") as rows:
        rows.write(json.dumps({"stage": "evaluate", "step": 9, "time": 4e9, "valid/auc": 0.5}) + "\n")
    assert entry_of(run, folder) == before
    provenance = numbers_of(folder / "evaluation")["provenance"]
    sections = provenance["config"] | {"lora": {"r": 3, "of_an_older_version": 1}}
    change(folder, provenance=provenance | {"config": sections, "train": {"step": 3}}, trained_on_these_shards=False)
    other = entry_of(run, folder)
    assert (other.settings, other.num_steps) == ({"lora.r": 3}, 3)
    assert (other.train_hours, other.tokens_per_user) == (0, 0), "the log is of another training"
    change(folder, provenance={})
    assert entry_of(run, folder).num_steps == 0, "a model from elsewhere"


def test_other_users_and_other_metrics_have_other_tables(run: Path, folder: Path) -> None:
    entry = entry_of(run, folder)
    cut = {
        name: {key: value for key, value in values.items() if "@1" not in key} for name, values in entry.systems.items()
    }
    others = [replace(entry, run="few", num_users=20), replace(entry, run="valid", split="valid")]
    table = markdown([entry, *others, replace(entry, run="cut", systems=cut)], "# Head")
    heads = [line.split("|")[2:4] for line in table.splitlines() if line.startswith("| system")]
    assert heads == [[" R@1 ", " R@3 "]] * 3 + [[" R@3 ", " NDCG@3 "]]
    for scope in ("146 test users", "20 test users", "146 valid users"):
        assert scope in table


def test_without_resamples_there_are_means_alone(run: Path, folder: Path) -> None:
    bare = replace(entry_of(run, folder), intervals={}, gain={"mean": 0.125}, against={"bm25": {"mean": -0.25}})
    row = next(line for line in markdown([bare], "").splitlines() if line.startswith("| one |"))
    assert "| +0.1250 | -0.2500 |" in row


def test_the_published_table_is_readable(run: Path) -> None:
    shared, table = load_config(run / "config.yaml"), ROOT / "docs" / "real_results.json"
    entries = gather_entries([table], shared, "test")
    assert entries == gather_entries([table, table], shared, "test")
    assert len(entries) == markdown(entries, "").count("\n* `") > 0


def test_runs_of_one_name_are_refused(run: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one: the name of two runs"):
        gather_entries([folder, tmp_path / "other" / "one"], load_config(run / "config.yaml"), "test")


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
    options = ["--config", tmp_path / "shared.yaml", "--output"]
    before, notes = output.with_suffix(".json").read_text(), "# Mine\n\nWhat it says."
    output.with_suffix(".md").write_text(table.replace("# Results", notes))
    done = run_script("tools/leaderboard.py", output.with_suffix(".json"), folder, *options, output)
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".json").read_text() == before
    command, again = "Written by `python tools/leaderboard.py ", output.with_suffix(".md").read_text()
    assert again.startswith(f"{notes}\n\n{command}") and again.count(command) == 1
    assert again.partition("\n## ")[2] == table.partition("\n## ")[2]
    done = run_script("tools/leaderboard.py", folder / "evaluation/test.json", *options, tmp_path / "x")
    assert done.returncode == 1 and "evaluation/test.json: runs: field required" in done.stderr


def test_baselines_that_differ_between_runs_have_a_row_each(run: Path, folder: Path, tmp_path: Path) -> None:
    """Runs of equal candidates may have other histories, so another BM25; and another model is a setting."""
    other = shutil.copytree(folder, tmp_path / "two")
    results = numbers_of(other / "evaluation")
    results["baselines"]["bm25"]["recall@1"] = 0.5
    results["baseline_confidence"]["random"]["recall@3"] = [0, 1]  # of other resamples
    results["provenance"]["config"]["model"]["name_or_path"] = "/models/Other-1B"
    change(other, **results)
    table = markdown([entry_of(run, place) for place in (folder, other)], "# Head")
    assert "| BM25 (one) |" in table and "| BM25 (two) | 0.5000 |" in table and "| random |" in table
    assert "* `two`: `model.name_or_path=other-1b`" in table


def test_a_run_without_results_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none/evaluation/test.json: not there, or not finished; run tools/evaluate.py"):
        read_entries(tmp_path / "none", load_config(run / "config.yaml"), "test")
