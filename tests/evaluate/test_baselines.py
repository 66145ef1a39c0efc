"""Rankers that need no language model."""

import gc
import math
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from tests.summarize.world import write_histories
from trsr_dist.data.store import ArrowRows, HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.evaluate.baselines import Bm25, build_rankers, by_count, mean_ndcg
from trsr_dist.evaluate.reduce import rank_lists
from trsr_dist.evaluate.users import StoredSplit

NAMES = ("popularity", "recency")
TEXTS = ["the red fox", "the grey wolf hunts", "red paint and red brushes", "the the the"]


def test_counts_rank_by_what_train_users_did() -> None:
    assert [scores.tolist() for scores in by_count(np.array([1, 1, 2, 0]))([], [[3, 2, 0], [1]])] == [[0, 2, 1], [1]]


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


def test_bm25_keeps_no_terms_of_the_whole_catalogue() -> None:
    """They take a kilobyte an item: of millions of items more than a node may have."""

    def num_counters() -> int:
        return sum(type(found) is Counter for found in gc.get_objects())

    before = num_counters()
    bm25 = Bm25([f"red {number}" for number in range(1000)])
    assert num_counters() - before < 10
    assert bm25([3], [4, 3]).argmax() == 1


def test_users_are_ranked_without_reading_cells_one_by_one(tmp_path: Path) -> None:
    write_histories(tmp_path, {"train": 4, "test": 5})
    store = HistoryStore(tmp_path / "histories")
    rankers, split, users = build_rankers(store, NAMES, 0, tmp_path).rankers, StoredSplit(store, "test"), range(5)
    rows = [[store._users["test"].value(column, user) for column in range(5)] for user in users]
    with patch.object(ArrowRows, "value", side_effect=AssertionError("a cell")):
        ranked = rank_lists(rankers, list(store.names("test")), split.stored, (1,))
        found = [split.find(row[0], [f"N{item}" for item in sorted(row[2])]) for row in rows]
    assert [astuple(user.row) for user in found] == list(map(tuple, rows))
    assert [user.candidates for user in found] == [sorted(row[2]) for row in rows]
    popularity = store.catalogue.column("popularity")
    counts = [[popularity[item] for item in row[2]] for row in rows]
    expected = ranked.table.add([np.array(count) for count in counts], [np.array(row[3]) for row in rows])
    assert ranked.outcomes["popularity"].tolist() == expected.tolist() and ranked.outcomes.keys() == {"random", *NAMES}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_has_diverged_is_no_perfect_one(value: float, tmp_path: Path) -> None:
    """Nothing is above NaN. Nor is such a model ever chosen by the validation users."""
    write_histories(tmp_path, {"train": 4, "test": 5})
    store, good = HistoryStore(tmp_path / "histories"), by_count(np.arange(1000))
    users, split = list(store.names("test")), StoredSplit(store, "test")

    def diverged(histories: list, candidates: list) -> list[np.ndarray]:
        return [np.full(len(items), value) for items in candidates]

    rows = [split.row(user) for user in users]
    assert mean_ndcg(diverged, rows) == 0 < mean_ndcg(good, rows)
    with pytest.raises(DataError, match="sasrec: a score is not finite"):
        rank_lists({"bm25": good, "sasrec": diverged}, users, split.stored, (1,))
