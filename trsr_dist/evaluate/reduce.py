"""From part files to numbers: coverage, baselines without a language model, metrics, examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trsr_dist.data.store import HistoryStore
from trsr_dist.evaluate.baselines import Ranker
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.examples import NUM_EXAMPLES, build_example
from trsr_dist.evaluate.parts import split_parts
from trsr_dist.evaluate.passes import ScoringPass
from trsr_dist.evaluate.rankers import build_rankers
from trsr_dist.evaluate.results import ResultSettings, ScoredSystems, build_results, metric_values, system_results
from trsr_dist.evaluate.scores import Expected, ScoreFolder, UserScores, check_coverage, in_order
from trsr_dist.evaluate.split import SplitUsers
from trsr_dist.evaluate.stored import StoredSplit, StoredUser, rank_all, user_facts
from trsr_dist.hashing import digest


@dataclass(frozen=True, slots=True)
class Reduced:
    """What is published."""

    results: dict[str, Any]
    systems: ScoredSystems
    """On the shards' own candidates."""
    examples: list[dict[str, Any]]


class Reduction:
    """Reads the scores of all passes back and computes with them.

    Args:
        job: the evaluation.
        users: of the split.
        split: finds the users in the history store.
        store: histories and items.
        folders: the scores of each pass, opened.
    """

    def __init__(
        self,
        job: Evaluation,
        users: SplitUsers,
        split: StoredSplit,
        store: HistoryStore,
        folders: Mapping[str, ScoreFolder],
    ) -> None:
        self._folders = folders
        self._job = job
        self._users = users
        self._split = split
        self._store = store

    @cached_property
    def _rankers(self) -> dict[str, Ranker]:
        return build_rankers(self._store, self._job.config.evaluate.baselines, self._job.config.run.seed)

    def missing(self, entry: ScoringPass) -> list[int]:
        """Parts of a pass that nobody has scored yet."""
        return self._folders[entry.name].missing(len(split_parts(len(self._users))))

    def run(self, provenance: dict[str, Any], trained_on_these_shards: bool | None) -> Reduced:
        """All numbers.

        Args:
            provenance: of the model.
            trained_on_these_shards: whether its train users are those of the run; None where that is unknown.

        Raises:
            DataError: the scores do not cover the split exactly, or the store is not the shards' own.
        """
        job, pairs = self._job, list(self._users.pairs())
        scored = self._read("", pairs)
        stored = [self._split.find(user, items) for user, items, _ in pairs]
        systems = self._systems(scored, stored)
        settings = self._settings(provenance)
        values = metric_values(systems, settings.top_k)
        facts = self._facts(stored, scored["model"])
        head = {
            "split": job.split,
            "model": job.model,
            "candidates": job.config.data.candidates,
            "candidate_hash": self._users.candidate_hash,
            "trained_on_these_shards": trained_on_these_shards,
        }
        tail = {
            "protocols": {protocol: self._protocol(protocol, settings) for protocol in job.protocols},
            "trims": count_trims(scored["model"]),
            "provenance": provenance,
        }
        results = head | build_results(systems, values, facts, settings) | tail
        return Reduced(results, systems, self._examples(systems))

    def _protocol(self, protocol: str, settings: ResultSettings) -> dict[str, Any]:
        """Model, control and the baselines without a language model on one kind of drawn lists."""
        pairs = list(self._users.pairs(protocol))
        scored = self._read(protocol, pairs)
        systems = self._systems(scored, [self._users.stored(protocol, user) for user, _, _ in pairs])
        values = metric_values(systems, settings.top_k)
        return {"candidate_hash": digest(pairs)} | system_results(systems, values, settings)

    def _systems(self, scored: dict[str, list[UserScores]], stored: list[StoredUser]) -> ScoredSystems:
        scores = {name: [user.scores for user in found] for name, found in scored.items()}
        scores |= {name: rank_all(ranker, stored) for name, ranker in self._rankers.items()}
        return ScoredSystems([user.labels for user in scored["model"]], scores)

    def _read(self, protocol: str, pairs: list[Expected]) -> dict[str, list[UserScores]]:
        passes = [entry for entry in self._job.passes if entry.protocol == protocol]
        return {entry.system: read_pass(self._folders[entry.name], pairs) for entry in passes}

    def _settings(self, provenance: dict[str, Any]) -> ResultSettings:
        evaluate = self._job.config.evaluate
        trained_with = provenance.get("train", {}).get("negatives_per_positive")
        return ResultSettings(evaluate.top_k, evaluate.bootstrap_samples, self._job.config.run.seed, trained_with)

    def _facts(self, stored: list[StoredUser], scored: list[UserScores]) -> list[dict[str, str]]:
        """What the slices tell users apart by."""
        return [
            user_facts(self._store, self._users.sample(index), stored[index], scored[index].trims)
            for index in range(len(self._users))
        ]

    def _examples(self, systems: ScoredSystems) -> list[dict[str, Any]]:
        """The first users of the split, whose order is a hash."""
        model, control = systems.scores["model"], systems.scores["control"]
        return [
            build_example(self._users.sample(index), model[index], control[index])
            for index in range(min(NUM_EXAMPLES, len(self._users)))
        ]


def read_pass(folder: ScoreFolder, pairs: list[Expected]) -> list[UserScores]:
    """Scores of a pass in the order of the split, each (user, candidate) exactly once.

    Raises:
        DataError: names the pairs that are missing, doubled or unknown.
        RunError: the folder has become another evaluation's.
    """
    found = folder.read()
    check_coverage(folder.folder, pairs, found)
    return in_order(pairs, found)


def count_trims(scored: list[UserScores]) -> dict[str, int]:
    """Users whose prompts were cut to fit, and the sums of what was cut."""
    counts = Counter({"users": sum(bool(user.trims) for user in scored)})
    for user in scored:
        counts.update(user.trims)
    return dict(sorted(counts.items()))
