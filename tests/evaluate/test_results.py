"""The numbers of the results file, from scores whose answer is known."""

import json

import numpy as np

from trsr_dist.evaluate.results import ResultSettings, ScoredSystems, build_results, metric_values
from trsr_dist.evaluate.slices import length_slice, slice_table
from trsr_dist.evaluate.table import gain_line, metric_table

SETTINGS = ResultSettings(top_k=(3, 5, 10), num_samples=200, seed=0, train_negatives=1)


def systems_of(num_users: int) -> ScoredSystems:
    """The model knows half of the answer, the control nothing, popularity is constant."""
    stream = np.random.default_rng(0)
    labels = [np.eye(21, dtype=np.int64)[stream.integers(21)] for _ in range(num_users)]
    model = [(2 * label + stream.normal(size=21)).astype(np.float32) for label in labels]
    control = [stream.normal(size=21).astype(np.float32) for _ in labels]
    return ScoredSystems(labels, {"model": model, "control": control, "popularity": [np.ones(21)] * num_users})


def test_results_hold_what_scripts_read() -> None:
    systems = systems_of(120)
    values = metric_values(systems, SETTINGS.top_k)
    facts = [{"trimmed": "no" if user % 3 else "yes"} for user in range(120)]
    results = build_results(systems, values, facts, SETTINGS)
    assert json.loads(json.dumps(results)) == results
    assert (results["num_users"], results["num_candidates"]) == (120, 120 * 21)
    assert set(results["metrics"]) == {f"{m}@{k}" for m in ("recall", "mrr", "ndcg") for k in (3, 5, 10)} | {"auc"}
    assert results["baselines"]["random"] == results["baselines"]["popularity"]
    assert results["baselines"]["random"]["recall@5"] == 5 / 21
    assert (results["tie_rate"], results["baseline_tie_rate"]["popularity"]) == (0.0, 1.0)
    low, high = results["confidence"]["recall@5"]
    assert low < results["metrics"]["recall@5"] < high
    gain = results["personalization_gain"]["recall@5"]
    assert gain["mean"] == np.mean(values["model"][:, 1] - values["control"][:, 1])
    assert 0 < gain["low"] < gain["mean"] < gain["high"]
    assert results["calibration"]["corrected"]["ece"] < results["calibration"]["raw"]["ece"]
    assert [(row["value"], row["num_users"]) for row in results["slices"]] == [("no", 80), ("yes", 40)]


def test_equal_input_gives_equal_bytes_and_no_samples_no_intervals() -> None:
    systems = systems_of(40)
    values = metric_values(systems, SETTINGS.top_k)
    facts = [{}] * 40
    first, second = (build_results(systems, values, facts, SETTINGS) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    bare = build_results(systems, values, facts, ResultSettings((3, 5, 10), 0, 0, None))
    assert (bare["confidence"], bare["personalization_gain"]) == ({}, {})
    assert "corrected" not in bare["calibration"]


def test_slices_need_more_than_30_users_and_stand_in_order() -> None:
    kinds = ["6-10"] * 31 + ["over 50"] * 31 + ["11-15"] * 31 + ["1-5"] * 30
    rows = slice_table([{"history length": kind} for kind in kinds], np.ones((123, 1)), np.zeros((123, 1)), ["auc"])
    assert [row["value"] for row in rows] == ["6-10", "11-15", "over 50"]
    assert rows[0]["personalization_gain"] == {"auc": 1.0}
    assert [length_slice(n) for n in (1, 5, 6, 50, 51)] == ["1-5", "1-5", "6-10", "31-50", "over 50"]


def test_table_has_one_row_a_system_in_a_fixed_order() -> None:
    metrics = {"recall@3": 0.5, "ndcg@3": 0.25}
    gain = {name: {"mean": 0.125, "low": 0.0, "high": 0.25} for name in metrics}
    results = {"metrics": metrics, "baselines": {"control": metrics, "random": metrics}, "personalization_gain": gain}
    lines = metric_table(results, ["recall@3", "ndcg@3"], "system").splitlines()
    assert lines[0].split() == ["system", "R@3", "NDCG@3"]
    assert [line.split()[0] for line in lines[2:]] == ["random", "fine-tuned", "control", "gain:"]
    assert lines[3].split()[-2:] == ["0.5000", "0.2500"]
    assert lines[5].split()[-2:] == ["+0.1250", "+0.1250"]


def test_gain_says_what_it_means() -> None:
    assert "depends on whose text" in gain_line({"mean": 0.3, "low": 0.2, "high": 0.4}, "recall@5")
    assert "no sign" in gain_line({"mean": 0.01, "low": -0.1, "high": 0.1}, "recall@5")
    assert "wrong" in gain_line({"mean": -0.3, "low": -0.4, "high": -0.2}, "recall@5")
