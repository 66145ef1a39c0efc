"""A user's metrics are those of the outcome, to the last bit, and equal outcomes have one number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trsr_dist.evaluate.metrics import average, position_probabilities, tie_rate, user_metrics
from trsr_dist.evaluate.outcomes import OutcomeTable

TOP_K = (1, 3, 10)
LISTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=2, max_size=30).filter(
    lambda pairs: 0 < sum(label for _, label in pairs) < len(pairs)
)


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
