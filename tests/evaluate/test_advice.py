"""What is suggested follows from the figures, and from nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from trsr_dist.evaluate.advice import is_rising, recipe, what_to_try

METRIC = "recall@5"
FLAT = [0.7] * 40


def difference(low: float, high: float) -> dict[str, Any]:
    return {METRIC: {"mean": (low + high) / 2, "low": low, "high": high}}


def results(**changes: Any) -> dict[str, Any]:
    """Of a model that has nothing to complain of."""
    good = {
        "num_users": 100,
        "tie_rate": 0.0,
        "trims": {"users": 0},
        "personalization_gain": difference(0.1, 0.2),
        "differences": {name: difference(0.05, 0.1) for name in ("bm25", "sasrec", "no_summary")},
    }
    return good | changes


def test_a_good_model_gets_no_advice() -> None:
    assert what_to_try(results(), FLAT, METRIC) == []


@pytest.mark.parametrize(
    ("changes", "train_auc", "word"),
    [
        ({"personalization_gain": difference(-0.01, 0.2)}, FLAT, "train.loss=listwise"),
        ({}, [0.5 + 0.005 * i for i in range(40)], "train.num_epochs"),
        ({"differences": {"bm25": difference(-0.2, -0.1), "sasrec": difference(-0.2, -0.1)}}, FLAT, "data.item_fields"),
        ({"differences": {"bm25": difference(0.0, 0.1), "sasrec": difference(-0.2, -0.1)}}, FLAT, "item ids is better"),
        ({"differences": {"no_summary": difference(-0.1, 0.1)}}, FLAT, "summarize.scheme=raw"),
        ({"trims": {"users": 10}}, FLAT, "10% of the users"),
        ({"tie_rate": 0.2}, FLAT, "prompt.max_candidate_tokens"),
    ],
)
def test_what_stands_out_is_named_alone(changes: dict[str, Any], train_auc: list[float], word: str) -> None:
    (sentence,) = what_to_try(results(**changes), train_auc, METRIC)
    assert word in sentence


def test_a_difference_whose_interval_holds_zero_is_none() -> None:
    assert what_to_try(results(differences={"bm25": difference(-0.2, 0.1)}), FLAT, METRIC) == []


def test_few_log_lines_tell_nothing() -> None:
    assert not is_rising([0.5, 0.6, 0.7]) and not is_rising([])


def test_recipe_leaves_out_what_is_not_recorded() -> None:
    provenance = {
        "train": {"loss": "listwise", "step": 200},
        "config": {"lora": {"r": 16, "target_modules": ["a", "b"]}},
    }
    assert recipe(provenance) == [("loss", "listwise"), ("steps", "200"), ("LoRA", "r 16, a, b")]
    assert recipe({}) == []
