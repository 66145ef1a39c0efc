"""Calibration against scores whose probabilities are known."""

import numpy as np
import pytest

from trsr_dist.evaluate.calibration import calibration, correct_prior, has_scale, probabilities


def test_true_probabilities_have_no_error_and_shifted_ones_have() -> None:
    stream = np.random.default_rng(0)
    scores = stream.normal(0, 2, size=40000)
    labels = (stream.random(40000) < probabilities(scores)).astype(int)
    assert calibration(scores, labels, None)["raw"]["ece"] < 0.01
    assert calibration(scores + 2, labels, None)["raw"]["ece"] > 0.15


def test_correction_undoes_the_training_ratio() -> None:
    """With 1 negative per positive in training and 20 here, true log-odds come out log(20) too high."""
    stream = np.random.default_rng(1)
    groups = np.arange(60000) % 21 == 0
    evidence = np.where(groups, stream.normal(1, 1, 60000), stream.normal(-1, 1, 60000)) * 2
    result = calibration(evidence, groups.astype(int), train_negatives=1)
    assert result["corrected"]["ece"] < 0.01
    assert result["raw"]["ece"] > 0.05


def test_extreme_scores_do_not_overflow() -> None:
    with np.errstate(all="raise"):
        assert probabilities(np.array([-1e5, 0.0, 1e5])).tolist() == [0.0, 0.5, 1.0]


def test_bins_count_everything_once() -> None:
    scores = np.linspace(-8, 8, 999)
    bins = calibration(scores, (scores > 0).astype(int), None)["raw"]["bins"]
    assert sum(entry["count"] for entry in bins) == 999
    assert bins[-1]["high"] == pytest.approx(1.0)


def test_probabilities_and_priors_by_hand() -> None:
    scores = np.log(np.array([3.0, 1.0, 0.25], dtype=np.float32))
    np.testing.assert_allclose(probabilities(scores), [0.75, 0.5, 0.2], atol=1e-6)
    moved = correct_prior(np.array([0.0, 1.0], dtype=np.float32), 2, 8)
    assert moved.tolist() == [pytest.approx(np.log(0.25), abs=1e-15), pytest.approx(1 + np.log(0.25), abs=1e-15)]
    assert moved.dtype == probabilities(scores).dtype == np.float64


def test_the_reliability_table_by_hand() -> None:
    chances = np.array([0.02, 0.04, 0.04, 0.55, 0.98])
    result = calibration(np.r_[np.log(chances / (1 - chances)), 1e3], np.array([0, 1, 0, 1, 0, 1]), None)
    assert result.keys() == {"raw"}
    bins = [tuple(entry.values()) for entry in result["raw"]["bins"]]
    expected = [(0.0, 0.1, 3, 0.1 / 3, 1 / 3), (0.5, 0.6, 1, 0.55, 1.0), (0.9, 1.0, 2, 0.99, 0.5)]
    for found, row in zip(bins, expected, strict=True):
        assert found == pytest.approx(row)
    assert list(result["raw"]["bins"][0]) == ["low", "high", "count", "predicted", "observed"]
    assert result["raw"]["ece"] == pytest.approx((3 * (1 / 3 - 0.1 / 3) + 0.45 + 2 * 0.49) / 6)


def test_the_correction_takes_the_ratio_that_is_met() -> None:
    scores, labels = np.linspace(-2, 3, 8), np.array([0, 0, 1, 0, 0, 0, 1, 0])
    found = calibration(scores, labels, train_negatives=1)
    assert found["corrected"] == calibration(scores - np.log(3), labels, None)["raw"]
    assert found["raw"] == calibration(scores, labels, None)["raw"]


def test_losses_that_leave_the_place_of_the_scores_open() -> None:
    assert [has_scale(loss) for loss in ("pointwise", None, "pairwise", "listwise")] == [True, True, False, False]
