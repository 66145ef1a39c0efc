"""An evaluation without a model says of the baselines what one with a model does."""

import shutil
from pathlib import Path

import pytest

from tests.evaluate.world import numbers_of, write_config
from tests.spawn import run_script
from trsr_dist.config import load_config
from trsr_dist.errors import ConfigError, RunError
from trsr_dist.evaluate.job import evaluate, evaluate_baselines
from trsr_dist.files import read_json

ASKED = ["evaluate.baselines=[popularity,recency,bm25]"]


@pytest.fixture(scope="module")
def bar(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the command; the run's shards and models are hidden from it."""
    folder = tmp_path_factory.mktemp("bar")
    shutil.copytree(run / "histories", folder / "run" / "histories")
    write_config(folder / "run", evaluate={"baselines": ["popularity", "recency", "bm25"], "protocols": ["uniform"]})
    done = run_script("tools/evaluate.py", "--config", folder / "run" / "config.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    tables = done.stdout.split("\n\n")
    assert "146 test users, 1022 candidates, negatives: targets" in tables[0]
    assert "146 test users, 1022 candidates, negatives: uniform" in tables[1]
    assert all("BM25 " in table and "fine-tuned" not in table for table in tables)
    return folder / "run" / "evaluation"


def test_baselines_rank_as_beside_a_model(run: Path, bar: Path, alone: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(alone, tmp_path / "whole")
    evaluate(load_config(run / "config.yaml", ASKED), "RUN/merged", output=str(whole))
    expected, found = numbers_of(whole), read_json(bar / "baselines" / "test.json")
    systems = {"random", "popularity", "recency", "bm25"}
    assert set(found["baselines"]) == systems
    for name in systems:
        assert found["baselines"][name] == expected["baselines"][name]
        assert found["baseline_tie_rate"].get(name) == expected["baseline_tie_rate"].get(name)
    assert (found["num_users"], found["num_candidates"]) == (expected["num_users"], expected["num_candidates"])
    assert not set(found) - set(expected)


def test_further_lists_are_other_lists(bar: Path) -> None:
    found = read_json(bar / "baselines" / "test.json")
    assert set(found["protocols"]) == {"uniform"}
    uniform = found["protocols"]["uniform"]
    assert uniform["num_candidates"] == found["num_candidates"]
    assert uniform["baselines"]["random"] == found["baselines"]["random"]
    assert uniform["baselines"]["popularity"] != found["baselines"]["popularity"]


def test_the_first_users_alone(run: Path, tmp_path: Path) -> None:
    evaluate_baselines(load_config(run / "config.yaml", ["evaluate.max_users=5"]), str(tmp_path))
    assert read_json(tmp_path / "baselines" / "test.json")["num_users"] == 5


def test_what_has_no_bar_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the candidate lists were drawn with targets"):
        evaluate_baselines(load_config(run / "config.yaml", ["data.candidates=uniform"]), str(tmp_path))
    with pytest.raises(RunError, match="manifest"):
        evaluate_baselines(load_config(run / "config.yaml", [f"run.dir={tmp_path / 'none'}"]))
