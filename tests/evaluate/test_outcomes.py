"""A user's metrics are those of the outcome, to the last bit, and equal outcomes have one number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trsr_dist.evaluate import outcomes
from trsr_dist.evaluate.metrics import average, position_probabilities, tie_rate, user_metrics
from trsr_dist.evaluate.outcomes import OutcomeTable

TOP_K = (1, 3, 10)
LISTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=2, max_size=30).filter(
    lambda pairs: 0 < sum(label for _, label in pairs) < len(pairs)
)


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
    monkeypatch.delattr(outcomes, "_key")
    assert table.add(scores[:3], labels[:3]).tolist() == numbers[:3].tolist(), "one positive: no user on its own"


def test_equal_outcomes_have_equal_keys() -> None:
    assert outcomes._key(np.array([0.0, 3.0, 3.0, 1.0, 9.0]), np.array([0, 1, 0, 1, 0])) == (5, 1, 2, 1, 3, 1, 1)
    scores, labels = outcomes._example((5, 1, 2, 1, 3, 1, 1))
    assert (scores.tolist(), labels.tolist()) == ([0.0, -1.0, -1.0, -3.0, -4.0], [0, 1, 0, 1, 0])
    assert (scores.dtype, labels.dtype) == (np.float64, np.int64)


@settings(max_examples=50, deadline=None)
@given(st.lists(LISTS, min_size=1, max_size=4))
def test_metrics_of_outcomes_are_those_of_the_users(lists: list[list[tuple[int, int]]]) -> None:
    scores = [np.array([score for score, _ in pairs], dtype=np.float32) for pairs in lists]
    labels = [np.array([label for _, label in pairs]) for pairs in lists]
    table = OutcomeTable(TOP_K)
    numbers = table.add(scores, labels)
    for number, user_scores, user_labels in zip(numbers.tolist(), scores, labels, strict=True):
        assert (table.rows[number] == user_metrics(user_scores, user_labels, TOP_K)).all()
        assert table.tie_rates[number] == tie_rate(user_scores, user_labels)
        length = len(user_labels)
        expected = np.cumsum(position_probabilities(user_scores, user_labels)[0]) / user_labels.sum()
        np.testing.assert_allclose(table.recall_curve(np.array([number]), length), expected, atol=1e-12)
    assert (table.add(scores[::-1], labels[::-1]) == numbers[::-1]).all()
    assert table.shortest(numbers) == min(map(len, labels))


def test_many_users_share_few_outcomes() -> None:
    stream = np.random.default_rng(0)
    labels = [np.eye(21, dtype=np.int64)[stream.integers(21)] for _ in range(4000)]
    table = OutcomeTable(TOP_K)
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
