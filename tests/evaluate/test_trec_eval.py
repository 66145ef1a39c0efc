"""Metrics against trec_eval's own code: equal for every user without ties, its mean over all tie orders for the others.

trec_eval orders tied candidates by their names, so that a scorer's metrics depend on what the items are called.
"""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from tests.evaluate.world import numbers_of
from trsr_dist.evaluate.metrics import tie_rate, user_metrics
from trsr_dist.evaluate.score_files import ScoreFolder, UserScores
from trsr_dist.records import metric_names

TOP_K = (3, 5, 10)


def trec_eval(users: Sequence[UserScores], top_k: Sequence[int] = TOP_K) -> np.ndarray:
    """Its recall, reciprocal rank and NDCG at each cut-off of every user, float64, shape (num_users, 3 * cut-offs).

    Its reciprocal rank knows no cut-off: it is shown the first candidates alone, as ``trec_eval -M`` does.
    """
    cuts = ",".join(map(str, top_k))
    labels = {user.user: dict(zip(user.items, user.labels.tolist(), strict=True)) for user in users}
    runs = {user.user: dict(zip(user.items, user.scores.tolist(), strict=True)) for user in users}
    whole = pytrec_eval.RelevanceEvaluator(labels, {f"recall.{cuts}", f"ndcg_cut.{cuts}"}).evaluate(runs)
    columns = [[whole[user.user][f"recall_{k}"] for user in users] for k in top_k]
    for k in top_k:
        heads = {name: first(run, k) for name, run in runs.items()}
        found = pytrec_eval.RelevanceEvaluator(labels, {"recip_rank"}).evaluate(heads)
        columns.append([found[user.user]["recip_rank"] for user in users])
    columns += [[whole[user.user][f"ndcg_cut_{k}"] for user in users] for k in top_k]
    return np.array(columns).T


def first(run: dict[str, float], k: int) -> dict[str, float]:
    """As trec_eval orders: by falling score, and of ties by falling name."""
    return dict(sorted(run.items(), key=lambda pair: (pair[1], pair[0]))[-k:])


def ours(users: Sequence[UserScores], top_k: Sequence[int] = TOP_K) -> np.ndarray:
    """The same of the evaluation, without AUC."""
    return np.array([user_metrics(user.scores, user.labels, top_k)[:-1] for user in users])


def made_user(name: str, scores: np.ndarray, labels: np.ndarray) -> UserScores:
    return UserScores(name, tuple(f"item {i}" for i in range(len(scores))), labels, scores.astype(np.float32))


def test_untied_users_have_the_metrics_of_trec_eval() -> None:
    stream, users = np.random.default_rng(0), []
    for number in range(300):
        labels = np.zeros(stream.integers(2, 60), dtype=np.int64)
        labels[: stream.integers(1, len(labels))] = 1
        scores = stream.permutation(len(labels)) / 8  # exact in float32, which trec_eval computes in
        users.append(made_user(f"user {number}", scores, stream.permutation(labels)))
    np.testing.assert_allclose(ours(users), trec_eval(users), atol=1e-12)


def test_a_written_evaluation_has_the_metrics_of_trec_eval(alone: Path) -> None:
    for name in ("model", "control"):
        users = list(ScoreFolder(alone / "test" / name).users())
        untied = [user for user in users if not tie_rate(user.scores, user.labels)]
        assert len(untied) > 0.9 * len(users) > 100
        np.testing.assert_allclose(ours(untied), trec_eval(untied), atol=1e-12)


def test_published_means_are_those_of_trec_eval(alone: Path) -> None:
    users = list(ScoreFolder(alone / "test" / "model").users())
    assert not any(tie_rate(user.scores, user.labels) for user in users)
    expected = dict(zip(metric_names((1, 3)), trec_eval(users, (1, 3)).mean(axis=0), strict=False))
    assert {name: numbers_of(alone)["metrics"][name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_ties_have_the_mean_of_trec_eval_over_all_names() -> None:
    scores, labels = np.array([2.0, 1.0, 1.0, 1.0, 0.0, 0.0]), np.array([0, 1, 0, 1, 0, 1])
    orders = list(permutations(range(len(scores))))
    named = [made_user(f"{i}", scores[list(order)], labels[list(order)]) for i, order in enumerate(orders)]
    found = trec_eval(named, (2, 3, 5))
    assert (np.ptp(found, axis=0) > 0).all(), "all depend on the names"
    np.testing.assert_allclose(ours(named[:1], (2, 3, 5))[0], found.mean(axis=0), atol=1e-12)
