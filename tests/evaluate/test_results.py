"""The numbers of the results file, from scores whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from trsr_dist.evaluate.metrics import OutcomeTable
from trsr_dist.evaluate.reduce import Outcomes
from trsr_dist.evaluate.results import (
    ModelScores,
    RankedSystems,
    ResultSettings,
    UserFacts,
    build_results,
    length_slice,
    slice_table,
    system_results,
)
from trsr_dist.evaluate.table import gain_line, metric_table

SETTINGS = ResultSettings(top_k=(3, 5, 10), num_samples=200, seed=0, train_negatives=1)


def scores_of(num_users: int) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Labels, and scores by system: the model knows half of the answer, the control nothing, popularity is constant."""
    stream = np.random.default_rng(0)
    labels = [np.eye(21, dtype=np.int64)[stream.integers(21)] for _ in range(num_users)]
    model = [(2 * label + stream.normal(size=21)).astype(np.float32) for label in labels]
    control = [stream.normal(size=21).astype(np.float32) for _ in labels]
    constant = [np.ones(21)] * num_users
    return labels, {"random": constant, "model": model, "control": control, "popularity": constant}


def systems_of(num_users: int) -> tuple[RankedSystems, ModelScores]:
    """Their outcomes, collected in parts."""
    labels, scores = scores_of(num_users)
    outcomes = Outcomes(OutcomeTable(SETTINGS.top_k))
    for part in (slice(0, 30), slice(30, num_users)):
        outcomes.add({name: found[part] for name, found in scores.items()}, labels[part])
    return outcomes.systems(), ModelScores(np.concatenate(scores["model"]), np.concatenate(labels))


def facts_of(facts: list[dict[str, str]]) -> UserFacts:
    found = UserFacts()
    for entry in facts:
        found.add(entry)
    return found


def test_results_hold_what_scripts_read() -> None:
    systems, model = systems_of(120)
    facts = facts_of([{"trimmed": "no" if user % 3 else "yes"} for user in range(120)])
    results = build_results(systems, model, facts, SETTINGS)
    assert json.loads(json.dumps(results)) == results
    assert (results["num_users"], results["num_candidates"]) == (120, 120 * 21)
    assert set(results["metrics"]) == {f"{m}@{k}" for m in ("recall", "mrr", "ndcg") for k in (3, 5, 10)} | {"auc"}
    assert results["baselines"]["random"] == results["baselines"]["popularity"]
    assert results["baselines"]["random"]["recall@5"] == 5 / 21
    assert (results["tie_rate"], results["baseline_tie_rate"]["popularity"]) == (0.0, 1.0)
    low, high = results["confidence"]["recall@5"]
    assert low < results["metrics"]["recall@5"] < high
    gain = results["personalization_gain"]["recall@5"]
    values = {name: systems.table.rows[systems.outcomes[name]] for name in ("model", "control")}
    assert gain["mean"] == pytest.approx(np.mean(values["model"][:, 1] - values["control"][:, 1]))
    assert results["metrics"]["ndcg@10"] == math.fsum(values["model"][:, 8]) / 120, "to the last bit"
    assert 0 < gain["low"] < gain["mean"] < gain["high"]
    assert results["calibration"]["corrected"]["ece"] < results["calibration"]["raw"]["ece"]
    assert [(row["value"], row["num_users"]) for row in results["slices"]] == [("no", 80), ("yes", 40)]


def test_equal_input_gives_equal_bytes_and_no_samples_no_intervals() -> None:
    facts = facts_of([{"trimmed": "no"}] * 40)
    first, second = (build_results(*systems_of(40), facts, SETTINGS) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    bare = build_results(*systems_of(40), facts, ResultSettings((3, 5, 10), 0, 0, None))
    assert bare["confidence"] == {}
    assert bare["personalization_gain"]["auc"] == {"mean": first["personalization_gain"]["auc"]["mean"]}
    assert set(bare["slices"][0]) == {"slice", "value", "num_users", "metrics", "personalization_gain"}
    assert "corrected" not in bare["calibration"]


def test_numbers_do_not_depend_on_which_systems_there_are_nor_on_their_order() -> None:
    labels, scores = scores_of(120)
    scores["popularity"] = [np.random.default_rng(user).integers(9, size=21) for user in range(120)]
    found = []
    for names in (list(scores), [*scores][::-1], ["control", "random", "popularity"]):
        outcomes = Outcomes(OutcomeTable(SETTINGS.top_k))
        outcomes.add({"model": scores["model"]} | {name: scores[name] for name in names}, labels)
        found.append(system_results(outcomes.systems(), SETTINGS))
        outcomes = Outcomes(OutcomeTable(SETTINGS.top_k))
        outcomes.add({name: scores[name] for name in names[::-1]} | {"model": scores["control"]}, labels)
        found.append(system_results(outcomes.systems(), SETTINGS))
    assert found[0] == found[2] == found[4] and found[1] == found[3] == found[5]
    assert all(found[0][key] == found[1][key] for key in ("baselines", "baseline_confidence")), "whatever the model"


def test_slices_need_more_than_30_users_and_stand_in_order() -> None:
    kinds = ["6-10"] * 31 + ["over 50"] * 31 + ["11-15"] * 31 + ["1-5"] * 30
    table, labels = OutcomeTable(()), [np.array([1, 0])] * 124
    best, worst = table.add([np.array([1.0, 0.0])] * 124, labels), table.add([np.array([0.0, 1.0])] * 124, labels)
    facts = facts_of([{}, *({"history length": kind, "trimmed": "no"} for kind in kinds)])
    odd = facts_of([{"category": "\u2460" if user % 2 else "\u00b2"} for user in range(124)])
    assert [value for _, value, _ in odd.slices()] == ["\u00b2", "\u2460"], "digits that are no numbers"
    systems = RankedSystems(table, {"model": best, "control": worst}, 248)
    rows = slice_table(facts, systems, ResultSettings((), 10, 0, None))
    found = [(row["slice"], row["value"], row["num_users"]) for row in rows]
    lengths = [("history length", kind, 31) for kind in ("6-10", "11-15", "over 50")]
    assert found == [*lengths, ("trimmed", "no", 123)]
    assert rows[0]["personalization_gain"] == {"auc": 1.0}
    assert (rows[0]["confidence"], rows[0]["gain_confidence"]) == ({"auc": [1.0, 1.0]}, {"auc": [1.0, 1.0]})


def test_slices_hold_the_values_of_their_users() -> None:
    systems, _ = systems_of(120)
    values = [systems.table.rows[systems.outcomes[name]] for name in ("model", "control")]
    kinds = ["a" if user % 3 else "b" for user in range(120)]
    rows = slice_table(facts_of([{"kind": kind} for kind in kinds]), systems, replace(SETTINGS, num_samples=0))
    for row in rows:
        chosen = np.array(kinds) == row["value"]
        assert list(row["metrics"].values()) == pytest.approx(values[0][chosen].mean(axis=0).tolist())
        gains = (values[0] - values[1])[chosen].mean(axis=0)
        assert list(row["personalization_gain"].values()) == pytest.approx(gains.tolist())


def test_lengths_are_named() -> None:
    assert [length_slice(n) for n in (1, 5, 6, 50, 51)] == ["1-5", "1-5", "6-10", "31-50", "over 50"]


def test_table_has_one_row_a_system_in_a_fixed_order() -> None:
    metrics = {"recall@3": 0.5, "ndcg@3": 0.25}
    gain = {name: {"mean": 0.125, "low": 0.0, "high": 0.25} for name in metrics}
    results = {"metrics": metrics, "baselines": {"control": metrics, "random": metrics}, "personalization_gain": gain}
    lines = metric_table(results, ["recall@3", "ndcg@3"]).splitlines()
    assert lines[0].split() == ["system", "R@3", "NDCG@3"]
    assert [line.split()[0] for line in lines[2:]] == ["random", "fine-tuned", "control", "gain:"]
    assert lines[3].split()[-2:] == ["0.5000", "0.2500"]
    assert lines[5].split()[-2:] == ["+0.1250", "+0.1250"]


def test_gain_says_what_it_means() -> None:
    assert "depends on whose text" in gain_line({"mean": 0.3, "low": 0.2, "high": 0.4}, "recall@5")
    assert "no sign" in gain_line({"mean": 0.01, "low": -0.1, "high": 0.1}, "recall@5")
    assert "wrong" in gain_line({"mean": -0.3, "low": -0.4, "high": -0.2}, "recall@5")
    assert "+0.3000 (no interval" in gain_line({"mean": 0.3}, "recall@5")
