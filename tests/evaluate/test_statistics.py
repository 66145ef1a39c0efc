"""Intervals and p-values against what is known of the normal case, and their seeds; calibration against scores whose
probabilities are known."""

import numpy as np
import pytest

from trsr_dist.evaluate import statistics
from trsr_dist.evaluate.statistics import calibration, correct_prior, paired_differences, probabilities
from trsr_dist.records import has_scale


def bootstrap_interval(values: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Each row another user."""
    return statistics.bootstrap_interval(values, np.ones(len(values), dtype=np.int64), num_samples, seed)


def sign_flip_p_values(differences: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Each row another user."""
    return statistics.sign_flip_p_values(differences, np.ones(len(differences), dtype=np.int64), num_samples, seed)


def test_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(0.5, 1.0, size=(2000, 1))
    (low, high), error = bootstrap_interval(values, 1000, seed=1)[0], values.std() / np.sqrt(2000)
    np.testing.assert_allclose([low, high], values.mean() + np.array([-1.96, 1.96]) * error, atol=0.2 * error)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    stream, covered = np.random.default_rng(2), 0
    for trial in range(200):
        low, high = bootstrap_interval(stream.binomial(1, 0.3, size=(200, 1)).astype(float), 200, seed=trial)[0]
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 199


def test_p_values_of_no_difference_and_of_a_clear_one() -> None:
    stream = np.random.default_rng(4)
    one = stream.random((300, 2))
    other = one - np.array([0.0, 0.2]) + stream.normal(0, 0.1, size=(300, 2)) * np.array([1.0, 1.0])
    none, clear = paired_differences(one - other, np.ones(300, dtype=np.int64), 500, seed=0)
    assert none.p_value > 0.01
    assert clear.p_value == 1 / 501
    assert clear.low > 0.15
    assert clear.mean > clear.low
    assert clear.high > clear.mean


def test_runs_that_are_equal_have_p_value_one() -> None:
    assert sign_flip_p_values(np.zeros((40, 3)), 100, 0).tolist() == [1.0, 1.0, 1.0]


def test_p_value_of_one_user_in_eight_is_the_exact_one() -> None:
    differences = np.ones((3, 1))
    assert abs(sign_flip_p_values(differences, 20000, 0)[0] - 2 / 8) < 0.02


def test_users_of_equal_values_may_be_counted() -> None:
    """The same bootstrap and the same test, with other draws."""
    values, counts = np.array([[0.0, -1.0], [0.25, 1.0], [1.0, 0.5]]), np.array([300, 500, 200])
    repeated = np.repeat(values, counts, axis=0)
    found = statistics.bootstrap_interval(values, counts, 4000, 1)
    np.testing.assert_allclose(found, bootstrap_interval(repeated, 4000, 2), atol=0.005)
    centered = values - values.T @ counts / counts.sum() + 0.02
    found = statistics.sign_flip_p_values(centered, counts, 4000, 1)
    np.testing.assert_allclose(found, sign_flip_p_values(np.repeat(centered, counts, axis=0), 4000, 2), atol=0.03)
    assert (found > 0.02).all() and (found < 0.98).all()


def test_intervals_and_p_values_by_a_plain_restatement() -> None:
    """Draws of how often each row comes, and of how many users of a row turn their sign; seeds must mean the same."""
    values, counts = np.array([[0.5, -1.0], [0.25, 1.0], [1.0, 0.5]]), np.array([3, 5, 2])
    found = paired_differences(values, counts, 41, seed=6)
    draws = np.random.default_rng(6).multinomial(10, [0.3, 0.5, 0.2], size=41)
    turned = np.random.default_rng(6).binomial(counts, 0.5, size=(41, 3))
    for metric, difference in enumerate(found):
        column = values[:, metric]
        means = sorted(sum(times * value for times, value in zip(draw, column, strict=True)) / 10 for draw in draws)
        assert difference.low == pytest.approx(means[1], abs=1e-12), "41 means: 1 of 40 steps from either end"
        assert difference.high == pytest.approx(means[39], abs=1e-12)
        observed = abs(counts @ column)
        reached = sum(abs((2 * turn - counts) @ column) >= observed - 1e-9 for turn in turned)
        assert difference.p_value == pytest.approx((1 + reached) / 42)
        assert difference.mean == pytest.approx(counts @ column / 10)


def test_the_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values, counts = np.random.default_rng(5).random((3, 2)) - 0.5, np.array([4, 1, 7])
    whole = paired_differences(values, counts, 10, seed=1)
    for numbers, sizes in ((12, [4, 4, 2]), (6, [2] * 5), (1, [1] * 10), (30, [10]), (29, [9, 1])):
        monkeypatch.setattr(statistics, "CHUNK_NUMBERS", numbers)
        assert [*statistics._chunks(10, counts)] == sizes
        assert paired_differences(values, counts, 10, seed=1) == whole


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
    losses = ("pointwise", None, "pairwise", "listwise", "distill")
    assert [has_scale(loss) for loss in losses] == [True, True, False, False, False]
