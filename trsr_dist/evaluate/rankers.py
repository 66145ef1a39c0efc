"""The baselines without a language model, made from what the train users did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError
from trsr_dist.evaluate.baselines import Bm25, Ranker, by_count, one_by_one
from trsr_dist.evaluate.metrics import average
from trsr_dist.evaluate.outcomes import OutcomeTable
from trsr_dist.evaluate.sequential import MODELS, SequentialRanker, SequentialSettings, make_ranker, train_sequential
from trsr_dist.files import atomic_file
from trsr_dist.hashing import digest
from trsr_dist.log import get_logger
from trsr_dist.records import metric_names

MAX_VALIDATION_USERS = 5000
"""As many choose the best epoch: more say little more."""
USERS_AT_ONCE = 256

log = get_logger("evaluate")


def build_rankers(store: HistoryStore, asked: Sequence[str], seed: int, folder: Path) -> dict[str, Ranker]:
    """The asked baselines that need no language model.

    Args:
        store: histories and items.
        asked: names of ``evaluate.baselines``.
        seed: of the models that are trained.
        folder: keeps them.
    """
    rankers: dict[str, Ranker] = {}
    if "popularity" in asked:
        rankers["popularity"] = one_by_one(by_count(store.catalogue.popularities()))
    if "recency" in asked:
        rankers["recency"] = one_by_one(by_count(store.count_items("train", "targets")))
    if "bm25" in asked:
        rankers["bm25"] = one_by_one(Bm25(store.catalogue.texts()))
    for name in MODELS:
        if name in asked:
            rankers[name] = trained(store, name, seed, folder)
    return rankers


def trained(store: HistoryStore, name: str, seed: int, folder: Path) -> SequentialRanker:
    """A sequential model of these histories and this seed: the one that is kept, or one trained here.

    Raises:
        DataError: there are no validation users, or the kept one is damaged.
    """
    settings = SequentialSettings()
    path = folder / f"{name}-{digest([store.manifest_hash, seed, asdict(settings)])[:16]}.safetensors"
    if not path.is_file():
        ranker = train_on(store, name, seed, settings)
        with atomic_file(path, "wb") as stream:
            stream.write(save(ranker.model.state_dict()))
        return ranker
    ranker = make_ranker(name, len(store.catalogue), settings)
    try:
        ranker.model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: not a {name} of these histories ({error}); remove it") from None
    log.info("%s: trained before: %s", name, path)
    return ranker


def train_on(store: HistoryStore, name: str, seed: int, settings: SequentialSettings) -> SequentialRanker:
    """A sequential model of the train users; its best epoch is chosen on the first validation users' candidates.

    Raises:
        DataError: there are no validation users.
    """
    if not store.num_users("valid"):
        raise DataError(
            f"evaluate.baselines: {name} chooses its best epoch on the validation users, and there are none; give "
            "data.split a share for them, or leave it out"
        )
    sequences = store.sequences("train", settings.max_length + 1)
    valid = [store.user("valid", index) for index in range(min(store.num_users("valid"), MAX_VALIDATION_USERS))]
    log.info("%s: training on %d users, the best epoch by NDCG@10 of %d others", name, len(sequences), len(valid))
    num_items = len(store.catalogue)
    return train_sequential(name, sequences, num_items, lambda ranker: mean_ndcg(ranker, valid), seed, settings)


def mean_ndcg(ranker: Ranker, rows: Sequence[UserRow]) -> float:
    """NDCG@10 over users of the store."""
    table, numbers = OutcomeTable((10,)), []
    for first in range(0, len(rows), USERS_AT_ONCE):
        users = rows[first : first + USERS_AT_ONCE]
        scores = ranker([row.history for row in users], [row.candidates for row in users])
        numbers.append(table.add(scores, [np.array(row.labels) for row in users]))
    means = average(*table.counted(np.concatenate(numbers)))
    return dict(zip(metric_names((10,)), means, strict=True))["ndcg@10"]
