"""The baselines without a language model, made from what the train users did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError
from trsr_dist.evaluate.baselines import Bm25, Ranker, by_count, one_by_one, target_counts
from trsr_dist.evaluate.metrics import metric_names, user_metrics
from trsr_dist.evaluate.protocols import targets_of
from trsr_dist.evaluate.sequential import MODELS, train_sequential
from trsr_dist.log import get_logger

log = get_logger("evaluate")


def build_rankers(store: HistoryStore, asked: Sequence[str], seed: int) -> dict[str, Ranker]:
    """The asked baselines that need no language model.

    Args:
        store: histories and items.
        asked: names of ``evaluate.baselines``.
        seed: of the models that are trained.
    """
    items, rankers = range(len(store.catalogue)), {}
    if "popularity" in asked:
        rankers["popularity"] = one_by_one(by_count(np.array([store.catalogue.popularity(item) for item in items])))
    if "recency" in asked:
        rankers["recency"] = one_by_one(by_count(target_counts(map(targets_of, train_rows(store)), len(items))))
    if "bm25" in asked:
        rankers["bm25"] = one_by_one(Bm25([store.catalogue.text(item) for item in items]))
    for name in MODELS:
        if name in asked:
            rankers[name] = train_on(store, name, seed)
    return rankers


def train_on(store: HistoryStore, name: str, seed: int) -> Ranker:
    """A sequential model of the train users; its best epoch is chosen on the validation users' candidates.

    Raises:
        DataError: there are no validation users.
    """
    if not store.num_users("valid"):
        raise DataError(
            f"evaluate.baselines: {name} chooses its best epoch on the validation users, and there are none; give "
            "data.split a share for them, or leave it out"
        )
    sequences = [[*row.history, *targets_of(row)] for row in train_rows(store)]
    valid = [store.user("valid", index) for index in range(store.num_users("valid"))]
    log.info("%s: training on %d users", name, len(sequences))
    return train_sequential(name, sequences, len(store.catalogue), lambda ranker: mean_ndcg(ranker, valid), seed)


def mean_ndcg(ranker: Ranker, rows: Sequence[UserRow]) -> float:
    """NDCG@10 over users of the store."""
    place = metric_names((10,)).index("ndcg@10")
    values = [user_metrics(ranker(row.history, row.candidates), np.array(row.labels), (10,))[place] for row in rows]
    return float(np.mean(values)) if values else 0.0


def train_rows(store: HistoryStore) -> list[UserRow]:
    """All train users."""
    return [store.user("train", index) for index in range(store.num_users("train"))]
