"""The baselines without a language model, from what the train users did.

Each is a function from users' rows of the history store to one score per candidate.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError
from trsr_dist.evaluate.metrics import OutcomeTable, average
from trsr_dist.evaluate.sequential import (
    GRID,
    MODELS,
    VERSION,
    SequentialRanker,
    SequentialSettings,
    Trained,
    make_grid,
    make_ranker,
    train_sequential,
)
from trsr_dist.files import atomic_file
from trsr_dist.hashing import digest
from trsr_dist.json_text import parse_json
from trsr_dist.log import get_logger
from trsr_dist.records import metric_names
from trsr_dist.words import search_terms

Scorer = Callable[[Sequence[int], Sequence[int]], np.ndarray]
"""From item rows of the history and of the candidates to float64 scores, shape (num_candidates,)."""
Ranker = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[np.ndarray]]
"""The same for many users: histories, candidates, scores."""
MAX_VALIDATION_USERS = 5000
"""Users that choose settings and epoch: more add little."""
USERS_AT_ONCE = 256
KEPT_ITEMS = 65_536
"""Whose terms are in memory, the last ones used: an item's take ten times the memory of its text."""
FACTS = "trained"
"""In the header of a kept model: how it came about."""

log = get_logger("evaluate")


def one_by_one(score: Scorer) -> Ranker:
    """A ranker that looks at one user after the other."""
    return lambda histories, candidates: list(map(score, histories, candidates))


def by_count(counts: np.ndarray) -> Ranker:
    """Rank by a count per item: of train users' clicks (popularity), or of the clicks that were their latest
    (recency, since a target is a user's latest click; needs no times)."""
    scores = counts.astype(np.float64)

    def rank(histories: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[np.ndarray]:
        starts = [0, *accumulate(map(len, candidates))]
        found = scores[np.fromiter(chain.from_iterable(candidates), np.int64, starts[-1])]
        return [found[start:end] for start, end in pairwise(starts)]

    return rank


class Bm25:
    """Okapi BM25 of the whole history as query against a candidate's text (Robertson and Zaragoza, 2009).

    Args:
        texts: of all items, by row; they give the document frequencies and the mean length. Their terms are words
            (n-grams of characters where words stand without blanks or carry particles).
        k1: saturation of a word's count.
        b: strength of the length normalization.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        self._terms = lru_cache(KEPT_ITEMS)(lambda item: Counter(search_terms(texts[item])))
        lengths, frequencies, total = np.empty(len(texts)), Counter(), len(texts)
        for item, text in enumerate(texts):
            terms = search_terms(text)
            lengths[item] = len(terms)
            frequencies.update({*terms})
        self._norms = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))
        self._scale = k1 + 1
        self._idf = {word: math.log(1 + (total - n + 0.5) / (n + 0.5)) for word, n in frequencies.items()}

    def __call__(self, history: Sequence[int], candidates: Sequence[int]) -> np.ndarray:
        query: Counter[str] = Counter()
        for item in history:
            query.update(self._terms(item))
        return np.array([self._score(query, item) for item in candidates])

    def _score(self, query: Counter[str], item: int) -> float:
        norm = self._norms[item]
        return sum(
            query[word] * self._idf[word] * count * self._scale / (count + norm)
            for word, count in self._terms(item).items()
            if word in query
        )


@dataclass(frozen=True, slots=True)
class Baselines:
    """Rankers that need no language model."""

    rankers: dict[str, Ranker]
    tuning: dict[str, Any]
    """By trained model: its softmax, the chosen point of the grid, all points with their validation metric."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What the sequential models are made from."""

    store: HistoryStore
    sequences: Sequence[np.ndarray]
    """Of the train users: item rows, int32, oldest first, the targets last."""
    valid: Sequence[UserRow]
    """Users whose candidates choose settings and epoch."""
    seed: int

    @property
    def num_items(self) -> int:
        return len(self.store.catalogue)


def build_rankers(store: HistoryStore, asked: Sequence[str], seed: int, folder: Path) -> Baselines:
    """The asked baselines that need no language model.

    Args:
        store: histories and items.
        asked: names of ``evaluate.baselines``.
        seed: of the models that are trained.
        folder: keeps them.

    Raises:
        DataError: a model is to be trained without validation users, or a kept one is damaged.
    """
    rankers: dict[str, Ranker] = {}
    if "popularity" in asked:
        rankers["popularity"] = by_count(store.catalogue.column("popularity"))
    if "recency" in asked:
        rankers["recency"] = by_count(store.count_items("train", "targets"))
    if "bm25" in asked:
        rankers["bm25"] = one_by_one(Bm25(store.catalogue.strings("text")))
    tuning, names = {}, [name for name in MODELS if name in asked]
    data = read_training_data(store, names, seed) if names else None
    for name in names:
        rankers[name], tuning[name] = tuned(data, name, folder)
    return Baselines(rankers, tuning)


def read_training_data(store: HistoryStore, names: Sequence[str], seed: int) -> TrainingData:
    """Sequences of the train users, and the first validation users.

    Raises:
        DataError: there are no validation users.
    """
    if not store.num_users("valid"):
        raise DataError(
            f"evaluate.baselines: {' and '.join(names)} are tuned on the validation users, and there are none; give "
            "data.split a share for them, or leave them out"
        )
    valid = [store.user("valid", index) for index in range(min(store.num_users("valid"), MAX_VALIDATION_USERS))]
    return TrainingData(store, store.sequences("train", SequentialSettings().max_length + 1), valid, seed)


def tuned(data: TrainingData, name: str, folder: Path) -> tuple[SequentialRanker, dict[str, Any]]:
    """The model of the grid that ranks the validation users best, and how it was found."""
    grid = make_grid(list(map(len, data.sequences)), data.num_items)
    num_negatives = grid[0].num_negatives
    softmax = f"{num_negatives} of {data.num_items} items, sampled" if num_negatives else f"all {data.num_items} items"
    log.info(
        "%s: softmax over %s; %d of %d settings are tried, each in at most %d epochs of %d steps on one core",
        name, softmax, len(grid), len(GRID), grid[0].max_epochs, -(-len(data.sequences) // grid[0].batch_size),
    )  # fmt: skip
    found = []
    for settings in grid:
        started = time.monotonic()
        model = trained(data, name, settings, folder)
        found.append(model)
        point = ", ".join(f"{key} {value}" for key, value in settings.point.items())
        log.info(
            "%s: %s: validation NDCG@10 %.4f, epoch %d of %d, %.0f s",
            name, point, model.ndcg, model.best_epoch, model.num_epochs, time.monotonic() - started,
        )  # fmt: skip
    best = max(found, key=lambda model: model.ndcg)
    return best.ranker, {
        "softmax": softmax,
        "batch_size": grid[0].batch_size,
        "train_users": len(data.sequences),
        "valid_users": len(data.valid),
        "chosen": grid[found.index(best)].point,
        "tried": [settings.point | model.facts for settings, model in zip(grid, found, strict=True)],
        "not_tried": len(GRID) - len(grid),
    }


def trained(data: TrainingData, name: str, settings: SequentialSettings, folder: Path) -> Trained:
    """A model of these histories, seed, settings and code: the one that is kept, or one trained here.

    Raises:
        DataError: the kept one is damaged.
    """
    key = digest([VERSION, data.store.manifest_hash, data.seed, asdict(settings)])
    path = folder / f"{name}-{key[:16]}.safetensors"
    if path.is_file():
        return read_trained(path, name, data.num_items, settings)
    model = train_sequential(
        name, data.sequences, data.num_items, lambda ranker: mean_ndcg(ranker, data.valid), data.seed, settings
    )
    with atomic_file(path, "wb") as stream:
        stream.write(save(model.ranker.model.state_dict(), {FACTS: json.dumps(model.facts)}))
    return model


def read_trained(path: Path, name: str, num_items: int, settings: SequentialSettings) -> Trained:
    """A kept model.

    Raises:
        DataError: it is damaged.
    """
    ranker = make_ranker(name, num_items, settings)
    try:
        with safe_open(path, "pt") as kept:
            ranker.model.load_state_dict({key: kept.get_tensor(key) for key in kept.keys()})  # noqa: SIM118
            return Trained(ranker, **parse_json(kept.metadata()[FACTS]))
    except (SafetensorError, RuntimeError, TypeError, DataError, KeyError) as error:
        raise DataError(f"{path}: not a {name} of these histories ({error}); remove it") from None


def mean_ndcg(ranker: Ranker, rows: Sequence[UserRow]) -> float:
    """NDCG@10 over users of the store; 0 of a model that has diverged."""
    table, numbers = OutcomeTable((10,)), []
    for first in range(0, len(rows), USERS_AT_ONCE):
        users = rows[first : first + USERS_AT_ONCE]
        scores = ranker([row.history for row in users], [row.candidates for row in users])
        if not np.isfinite(np.concatenate(scores)).all():
            return 0.0
        numbers.append(table.add(scores, [np.array(row.labels) for row in users]))
    means = average(*table.counted(np.concatenate(numbers)))
    return dict(zip(metric_names((10,)), means, strict=True))["ndcg@10"]
