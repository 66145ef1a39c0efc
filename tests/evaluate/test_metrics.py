"""Metrics against brute force over all tie orders, and the cases where the reference code is wrong."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trsr_dist.errors import DataError
from trsr_dist.evaluate.metrics import average, check_user, tie_rate, user_metrics
from trsr_dist.records import metric_names

TOP_K = (1, 3, 5)


def brute_force(scores: list[float], labels: list[int]) -> np.ndarray:
    """Plain definitions, averaged over every order that the scores allow."""
    orders = [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in zip(order, order[1:], strict=False))
    ]
    return np.mean([one_order([labels[i] for i in order]) for order in orders], axis=0)


def one_order(ranked: list[int]) -> list[float]:
    places = [place for place, label in enumerate(ranked, 1) if label]
    ideal = np.cumsum([1 / np.log2(place + 1) for place in range(1, len(places) + 1)])
    recall = [sum(place <= k for place in places) / len(places) for k in TOP_K]
    mrr = [1 / places[0] if places[0] <= k else 0 for k in TOP_K]
    gains = [sum(1 / np.log2(place + 1) for place in places if place <= k) for k in TOP_K]
    ndcg = [gain / ideal[min(k, len(places)) - 1] for gain, k in zip(gains, TOP_K, strict=True)]
    negatives = [place for place, label in enumerate(ranked, 1) if not label]
    auc = np.mean([p < n for p in places for n in negatives])
    return [*recall, *mrr, *ndcg, float(auc)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=2, max_size=6))
def test_ties_are_averaged_over_their_orders(pairs: list[tuple[int, int]]) -> None:
    scores, labels = [float(s) for s, _ in pairs], [label for _, label in pairs]
    if 0 < sum(labels) < len(labels):
        found = user_metrics(np.array(scores), np.array(labels), TOP_K)
        np.testing.assert_allclose(found, brute_force(scores, labels), atol=1e-12)


@pytest.mark.parametrize("place", [0, 7, 20])
def test_constant_scores_are_chance_wherever_the_positive_stands(place: int) -> None:
    labels = np.zeros(21, dtype=int)
    labels[place] = 1
    found = dict(zip(metric_names((3, 5, 10)), user_metrics(np.full(21, 0.7), labels, (3, 5, 10)), strict=True))
    assert found["recall@3"] == pytest.approx(3 / 21, abs=1e-15)
    assert found["mrr@10"] == pytest.approx(sum(1 / rank for rank in range(1, 11)) / 21, abs=1e-15)
    assert found["auc"] == 0.5
    assert tie_rate(np.full(21, 0.7), labels) == 1.0


def test_random_is_the_mean_of_random_scores() -> None:
    labels = np.array([1, 0, 0, 1, 0, 0, 0, 0])
    stream = np.random.default_rng(0)
    drawn = np.mean([user_metrics(stream.random(8), labels, TOP_K) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(user_metrics(np.zeros(8), labels, TOP_K), drawn, atol=0.02)


def test_thousands_of_candidates_and_positives() -> None:
    labels = np.r_[np.ones(900, dtype=int), np.zeros(4100, dtype=int)]
    found = user_metrics(np.zeros(5000), labels, (10,))
    assert found[0] == pytest.approx(10 / 5000)
    assert found[2] == pytest.approx(900 / 5000)


def test_a_perfect_and_a_worst_order() -> None:
    labels = np.array([0, 1, 0, 1])
    assert (user_metrics(np.array([0.0, 2.0, 1.0, 3.0]), labels, (2,)) == 1).all()
    assert (user_metrics(np.array([3.0, 0.0, 2.0, 1.0]), labels, (2,)) == 0).all()


def test_the_average_depends_neither_on_the_order_of_users_nor_on_how_they_are_counted() -> None:
    stream = np.random.default_rng(1)
    values, counts = stream.random((1001, 3)), stream.integers(1, 100, 1001)
    once = np.ones(counts.sum(), dtype=np.int64)
    repeated = np.repeat(values, counts, axis=0)
    assert average(values, counts) == average(values[::-1], counts[::-1]) == average(repeated, once)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.0, np.nan], [1, 0], "item 'b': score nan is not finite"),
        ([0.0, np.inf], [1, 0], "item 'b': score inf"),
        ([0.0, 1.0], [0, 0], "no positive"),
        ([0.0, 1.0], [1, 1], "no negative"),
    ],
)
def test_what_has_no_metric_is_refused(scores: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_user("u", np.array(scores), np.array(labels), ["a", "b"])


def test_only_ties_between_a_positive_and_a_negative_count() -> None:
    assert tie_rate(np.array([1.0, 1.0, 2.0, 0.0, 1.0]), np.array([1, 0, 1, 0, 0])) == pytest.approx(2 / 6)


def test_averages_by_hand() -> None:
    values = np.array([[1.0, 4.0], [3.0, 8.0]])
    assert average(values) == [2.0, 6.0]
    assert average(values, np.array([6, 2])) == [1.5, 5.0]


def test_what_has_metrics_is_not_refused() -> None:
    check_user("u", np.array([0.5, 0.0]), np.array([1, 0]), ["a", "b"])
