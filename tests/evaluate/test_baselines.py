"""Rankers that need no language model."""

import math

import numpy as np
import pytest

from trsr_dist.evaluate.baselines import Bm25, by_count

TEXTS = ["the red fox", "the grey wolf hunts", "red paint and red brushes", "the the the"]


def test_counts_rank_by_what_train_users_did() -> None:
    assert by_count(np.array([1, 1, 2, 0]))([], [3, 2, 0]).tolist() == [0.0, 2.0, 1.0]


def test_bm25_equals_its_formula() -> None:
    scores = Bm25(TEXTS)([0], [2, 1, 3])
    mean = (3 + 4 + 5 + 3) / 4
    idf = {"red": math.log(1 + 2.5 / 2.5), "the": math.log(1 + 1.5 / 3.5)}
    red = idf["red"] * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 5 / mean))
    the = idf["the"] * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 4 / mean))
    np.testing.assert_allclose(scores[:2], [red, the])


def test_bm25_of_an_unrelated_or_empty_history_is_zero() -> None:
    assert Bm25(TEXTS)([], [0, 1]).tolist() == [0.0, 0.0]
    assert Bm25(["", "a"])([0], [1]).tolist() == [0.0]


def test_bm25_reads_words_without_case_and_punctuation() -> None:
    assert Bm25(["RED!", "red"])([0], [1])[0] == pytest.approx(Bm25(["red", "red"])([0], [1])[0])
