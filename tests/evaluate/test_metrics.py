"""Metrics against brute force over all tie orders, and the cases where the reference code is wrong.

A user's metrics are those of the outcome, to the last bit, and equal outcomes have one number.
"""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trsr_dist.errors import DataError
from trsr_dist.evaluate import metrics
from trsr_dist.evaluate.metrics import (
    OutcomeTable,
    average,
    check_user,
    position_probabilities,
    tie_rate,
    user_metrics,
)
from trsr_dist.records import metric_names

TOP_K = (1, 3, 5)
CUTOFFS = (1, 3, 10)
LISTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=2, max_size=30).filter(
    lambda pairs: 0 < sum(label for _, label in pairs) < len(pairs)
)


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


def test_numbers_and_counts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four users: first of three twice, with and without a tie, and one of two of four."""
    scores = [np.array(user) for user in ([2.0, 1.0, 0.0], [5.0, 5.0, 1.0], [9.0, 7.0, 7.0], [0.0, 3.0, 3.0, 1.0])]
    labels = [np.array(user) for user in ([1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0, 1])]
    table = OutcomeTable((1, 2))
    numbers = table.add(scores, labels)
    assert numbers[0] == numbers[2] and len(set(numbers.tolist())) == len(table.rows) == 3
    assert (numbers.dtype, table.rows.shape, table.tie_rates.shape) == (np.int32, (3, 7), (3, 1))
    assert [table.tie_rates[number, 0] for number in numbers] == [0.0, 0.5, 0.0, 0.25]
    rows, counts = table.counted(numbers)
    assert sorted(counts.tolist()) == [1, 1, 2] and rows[counts == 2].tolist() == [[1.0] * 7]
    np.testing.assert_allclose(table.recall_curve(numbers, 3), np.array([1 + 0.5 + 1 + 0.25, 3.5, 4.0]) / 4)
    assert (table.shortest(numbers), table.shortest(numbers[3:])) == (3, 4)
    differences, counts = table.paired(numbers[[0, 1, 2, 3]], numbers[[1, 0, 1, 3]])
    found = {tuple(row): count for row, count in zip(differences.round(12).tolist(), counts.tolist(), strict=True)}
    gain = tuple((table.rows[numbers[0]] - table.rows[numbers[1]]).round(12).tolist())
    assert found == {gain: 2, tuple(-value + 0.0 for value in gain): 1, (0.0,) * 7: 1}
    monkeypatch.delattr(metrics, "outcome_of")
    assert table.add(scores[:3], labels[:3]).tolist() == numbers[:3].tolist(), "one positive: no user on its own"


def test_equal_outcomes_have_equal_keys() -> None:
    assert metrics.outcome_of(np.array([0.0, 3.0, 3.0, 1.0, 9.0]), np.array([0, 1, 0, 1, 0])) == (5, 1, 2, 1, 3, 1, 1)
    scores, labels = metrics.example_of((5, 1, 2, 1, 3, 1, 1))
    assert (scores.tolist(), labels.tolist()) == ([0.0, -1.0, -1.0, -3.0, -4.0], [0, 1, 0, 1, 0])
    assert (scores.dtype, labels.dtype) == (np.float64, np.int64)


@settings(max_examples=50, deadline=None)
@given(st.lists(LISTS, min_size=1, max_size=4))
def test_metrics_of_outcomes_are_those_of_the_users(lists: list[list[tuple[int, int]]]) -> None:
    scores = [np.array([score for score, _ in pairs], dtype=np.float32) for pairs in lists]
    labels = [np.array([label for _, label in pairs]) for pairs in lists]
    table = OutcomeTable(CUTOFFS)
    numbers = table.add(scores, labels)
    for number, user_scores, user_labels in zip(numbers.tolist(), scores, labels, strict=True):
        assert (table.rows[number] == user_metrics(user_scores, user_labels, CUTOFFS)).all()
        assert table.tie_rates[number] == tie_rate(user_scores, user_labels)
        length = len(user_labels)
        expected = np.cumsum(position_probabilities(user_scores, user_labels)[0]) / user_labels.sum()
        np.testing.assert_allclose(table.recall_curve(np.array([number]), length), expected, atol=1e-12)
    assert (table.add(scores[::-1], labels[::-1]) == numbers[::-1]).all()
    assert table.shortest(numbers) == min(map(len, labels))


def test_many_users_share_few_outcomes() -> None:
    stream = np.random.default_rng(0)
    labels = [np.eye(21, dtype=np.int64)[stream.integers(21)] for _ in range(4000)]
    table = OutcomeTable(CUTOFFS)
    numbers = [
        np.concatenate(
            [table.add(scores[first : first + 64], labels[first : first + 64]) for first in range(0, 4000, 64)]
        )
        for scores in ([stream.normal(size=21) for _ in labels], [stream.integers(4, size=21) for _ in labels])
    ]
    assert len(set(numbers[0].tolist())) == 21
    rows, counts = table.counted(numbers[1])
    assert counts.sum() == 4000
    values = [table.rows[found] for found in numbers]
    assert average(rows, counts) == average(values[1], np.ones(4000, dtype=np.int64))
    differences, counts = table.paired(*numbers)
    assert len(differences) < 4000
    assert counts @ differences == pytest.approx((values[0] - values[1]).sum(axis=0))


def test_the_table_of_outcomes_is_put_together_once_for_all_slices() -> None:
    """Among users whose lists have different lengths there are as many outcomes as users, and thousands of slices."""
    table, labels = OutcomeTable((1,)), [np.array([1, 0, 0])]
    first = table.add([np.array([3.0, 2.0, 1.0])], labels)
    assert table.rows is table.rows
    other = table.add([np.array([1.0, 2.0, 3.0])], labels)
    assert [table.rows[number][0].item() for number in (*first, *other)] == [1.0, 0.0]
