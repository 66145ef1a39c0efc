"""Calibration against scores whose probabilities are known."""

import numpy as np
import pytest

from trsr_dist.evaluate.calibration import calibration, probabilities


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
