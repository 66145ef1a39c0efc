"""From part files to numbers, part by part: coverage, baselines without a language model, outcomes, facts, examples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.evaluate.baselines import Ranker, build_rankers
from trsr_dist.evaluate.evaluation import Evaluation, check_draws
from trsr_dist.evaluate.metrics import OutcomeTable
from trsr_dist.evaluate.passes import ScoringPass, split_parts
from trsr_dist.evaluate.results import (
    NUM_EXAMPLES,
    ModelScores,
    RankedSystems,
    ResultSettings,
    UserFacts,
    baseline_results,
    build_example,
    build_results,
    length_slice,
    system_results,
)
from trsr_dist.evaluate.score_files import Expected, ScoreFolder, UserScores
from trsr_dist.evaluate.users import DrawnLists, SplitUsers, StoredSplit, StoredUser
from trsr_dist.hashing import ListDigest
from trsr_dist.log import progress
from trsr_dist.records import has_scale
from trsr_dist.shards.codec import Outline


@dataclass(frozen=True, slots=True)
class Reduced:
    """What is published."""

    results: dict[str, Any]
    systems: RankedSystems
    """On the shards' own candidates."""
    model: ModelScores
    examples: list[dict[str, Any]]


@dataclass(slots=True)
class Outcomes:
    """What is kept of the scores on one kind of candidate lists: four bytes a user and system."""

    table: OutcomeTable
    numbers: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    num_candidates: int = 0

    def add(self, scores: Mapping[str, Sequence[np.ndarray]], labels: Sequence[np.ndarray]) -> None:
        """The scores of a part's users under every system.

        Raises:
            DataError: one is not finite.
        """
        for name, users in scores.items():
            if not np.isfinite(np.concatenate(users)).all():
                raise DataError(
                    f"{name}: a score is not finite, so that it has no rank; a baseline has diverged with all its "
                    "settings (leave it out of evaluate.baselines), or a part file is damaged (--force scores again)"
                )
        found = self.table.add_all([*scores.values()], labels)
        for name, numbers in zip(scores, found, strict=True):
            self.numbers[name].append(numbers)
        self.num_candidates += sum(map(len, labels))

    def systems(self) -> RankedSystems:
        found = {name: np.concatenate(numbers) for name, numbers in self.numbers.items()}
        return RankedSystems(self.table, found, self.num_candidates)


@dataclass(slots=True)
class OwnScores:
    """What is kept of the shards' own lists beside the outcomes."""

    scores: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    facts: UserFacts = field(default_factory=UserFacts)
    trims: Counter[str] = field(default_factory=lambda: Counter(users=0))
    """Users whose prompts were cut to fit, and the sums of what was cut."""
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, scored: Sequence[UserScores]) -> None:
        """The model's scores of a part."""
        self.scores.append(np.concatenate([user.scores for user in scored]))
        self.labels.append(np.concatenate([user.labels for user in scored]).astype(np.int8))
        for user in scored:
            if user.trims:
                self.trims.update({"users": 1} | user.trims)

    def model(self) -> ModelScores:
        return ModelScores(np.concatenate(self.scores), np.concatenate(self.labels))


def all_scores(
    users: Sequence[StoredUser], scored: Mapping[str, Sequence[UserScores]], rankers: Mapping[str, Ranker]
) -> dict[str, Sequence[np.ndarray]]:
    """Scores of the users' candidates by every system: chance, those of a language model, those without one.

    Args:
        users: of a part, as rows of the history store.
        scored: by system, what a language model gave.
        rankers: by system.
    """
    histories, candidates = [user.row.history for user in users], [user.candidates for user in users]
    scores: dict[str, Sequence[np.ndarray]] = {"random": [np.zeros(len(items)) for items in candidates]}
    scores |= {name: [user.scores for user in found] for name, found in scored.items()}
    return scores | {name: ranker(histories, candidates) for name, ranker in rankers.items()}


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
        self._job = job
        self._users = users
        self._split = split
        self._store = store
        self._folders = folders
        self._categories, self._popularity = store.catalogue.strings("category"), store.catalogue.column("popularity")

    def missing(self, entry: ScoringPass) -> list[int]:
        """Parts of a pass that nobody has scored yet."""
        return self._folders[entry.name].missing(len(self._users))

    def run(self, provenance: dict[str, Any], trained_on_these_shards: bool | None) -> Reduced:
        """All numbers; trains the baselines that are not kept from an earlier evaluation.

        Args:
            provenance: of the model.
            trained_on_these_shards: whether its train users are those of the run; None where that is unknown.

        Raises:
            DataError: the scores do not cover the split exactly, or the store is not the shards' own.
            RunError: a folder has become another evaluation's.
        """
        for folder in self._folders.values():
            folder.check_names(len(self._users))
        config = self._job.config
        baselines = build_rankers(self._store, config.evaluate.baselines, config.run.seed, self._job.baselines)
        settings = result_settings(self._job, provenance.get("train", {}))
        outcomes, own = Outcomes(OutcomeTable(settings.top_k)), OwnScores()
        for number, part in self._parts("reduce"):
            self._add_own(number, part, baselines.rankers, outcomes, own)
        systems, model = outcomes.systems(), own.model()
        head = {
            "split": self._job.split,
            "model": self._job.model,
            "candidates": self._job.own_candidates,
            "candidate_hash": self._users.candidate_hash,
            "trained_on_these_shards": trained_on_these_shards,
        }
        protocols = {name: self._protocol(name, baselines.rankers, settings) for name in self._job.protocols}
        tail = {
            "protocols": protocols,
            "baseline_training": baselines.tuning,
            "trims": dict(sorted(own.trims.items())),
            "provenance": provenance,
        }
        results = head | build_results(systems, model, own.facts, settings) | tail
        for folder in self._folders.values():
            folder.check()
        return Reduced(results, systems, model, own.examples)

    def _add_own(
        self, number: int, part: range, rankers: Mapping[str, Ranker], outcomes: Outcomes, own: OwnScores
    ) -> None:
        outlines = [self._users.outline(index) for index in part]
        expected = [(outline.user, outline.items, outline.labels) for outline in outlines]
        stored = [self._split.find(user, items) for user, items, _ in expected]
        scored = self._read("", number, expected)
        outcomes.add(all_scores(stored, scored, rankers), [user.labels for user in scored["model"]])
        own.add(scored["model"])
        for place, outline in enumerate(outlines):
            own.facts.add(self._facts(outline, stored[place], scored["model"][place].trims))
            if len(own.examples) < NUM_EXAMPLES:  # the first users of the split, whose order is a hash
                model, control = (scored[name][place].scores for name in ("model", "control"))
                own.examples.append(build_example(self._users.sample(part[place]), model, control))

    def _facts(self, outline: Outline, user: StoredUser, trims: dict[str, int]) -> dict[str, str]:
        """What the slices tell users apart by."""
        targets = [item for item, label in zip(user.candidates, outline.labels, strict=True) if label]
        category = self._categories[targets[0]]
        facts = {
            "history length": length_slice(len(user.row.history)),
            "summary scheme": str(outline.provenance.get("scheme", "unknown")),
            "trimmed": "yes" if trims else "no",
            "target": "seen in training" if any(self._popularity[item] for item in targets) else "cold",
        }
        return facts | ({"category": category} if category else {})

    def _protocol(self, protocol: str, rankers: Mapping[str, Ranker], settings: ResultSettings) -> dict[str, Any]:
        """Model, control and the baselines without a language model on one kind of drawn lists."""
        outcomes, candidates, ids = Outcomes(OutcomeTable(settings.top_k)), ListDigest(), self._store.catalogue.ids
        for number, part in self._parts(f"reduce {protocol}"):
            stored = [self._users.stored(protocol, index) for index in part]
            expected = [(user.row.user, [ids[item] for item in user.candidates], user.labels()) for user in stored]
            scored = self._read(protocol, number, expected)
            outcomes.add(all_scores(stored, scored, rankers), [user.labels for user in scored["model"]])
            for entry in expected:
                candidates.add(entry)
        return {"candidate_hash": candidates.hexdigest()} | system_results(outcomes.systems(), settings)

    def _parts(self, description: str) -> Iterable[tuple[int, range]]:
        parts = split_parts(len(self._users))
        return progress(enumerate(parts), total=len(parts), description=description, unit="part")

    def _read(self, protocol: str, part: int, expected: Sequence[Expected]) -> dict[str, list[UserScores]]:
        """Scores of a part by system, in the order of the split, each (user, candidate) exactly once."""
        passes = [entry for entry in self._job.passes if entry.protocol == protocol]
        return {entry.system: self._folders[entry.name].read(part, expected) for entry in passes}


def rank_baselines(job: Evaluation) -> dict[str, Any]:
    """What an evaluation says of its baselines without a language model, from the histories alone.

    Raises:
        ConfigError: the candidate lists are other ones than the config says.
        DataError: the split has no users, or a trained baseline cannot be had.
    """
    store, evaluate, seed = HistoryStore(job.run.histories), job.config.evaluate, job.config.run.seed
    check_draws(job)
    users = list(store.names(job.split))[: evaluate.max_users or None]
    if not users:
        raise DataError(f"{job.run.histories}: no user to rank for; give data.split a share for {job.split}")
    baselines, split = build_rankers(store, evaluate.baselines, seed, job.baselines), StoredSplit(store, job.split)
    lists = {"": split.stored} | {
        protocol: DrawnLists(protocol, store, split, **job.draws(), seed=seed).stored for protocol in job.protocols
    }
    own, *others = (
        baseline_results(rank_lists(baselines.rankers, users, stored, evaluate.top_k), result_settings(job, {}))
        for stored in lists.values()
    )
    return {
        "split": job.split,
        "candidates": job.own_candidates,
        **own,
        "protocols": dict(zip(job.protocols, others, strict=True)),
        "baseline_training": baselines.tuning,
    }


def rank_lists(
    rankers: Mapping[str, Ranker], users: Sequence[str], stored: Callable[[str], StoredUser], top_k: Sequence[int]
) -> RankedSystems:
    """How all rankers, and chance, rank the candidates that ``stored`` gives each user."""
    outcomes = Outcomes(OutcomeTable(top_k))
    for part in split_parts(len(users)):
        found = [stored(users[index]) for index in part]
        outcomes.add(all_scores(found, {}, rankers), [np.array(user.labels()) for user in found])
    return outcomes.systems()


def result_settings(job: Evaluation, train: Mapping[str, Any]) -> ResultSettings:
    """How an evaluation's numbers are computed; ``train`` is what the provenance says of the training."""
    trained_with = train.get("negatives_per_positive") if has_scale(train.get("loss")) else None
    evaluate = job.config.evaluate
    return ResultSettings(evaluate.top_k, evaluate.bootstrap_samples, job.config.run.seed, trained_with)
