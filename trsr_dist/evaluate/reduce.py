"""From part files to numbers, part by part: coverage, baselines without a language model, outcomes, facts, examples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trsr_dist.data.store import HistoryStore
from trsr_dist.evaluate.calibration import has_scale
from trsr_dist.evaluate.coverage import Expected
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.examples import NUM_EXAMPLES, build_example
from trsr_dist.evaluate.outcomes import OutcomeTable
from trsr_dist.evaluate.parts import split_parts
from trsr_dist.evaluate.passes import ScoringPass
from trsr_dist.evaluate.rankers import Baselines, build_rankers
from trsr_dist.evaluate.results import ModelScores, RankedSystems, ResultSettings, build_results, system_results
from trsr_dist.evaluate.score_files import UserScores
from trsr_dist.evaluate.scores import ScoreFolder
from trsr_dist.evaluate.slices import UserFacts
from trsr_dist.evaluate.split import SplitUsers
from trsr_dist.evaluate.stored import StoredSplit, StoredUser, labels_of, rank_all, user_facts
from trsr_dist.hashing import ListDigest
from trsr_dist.log import progress
from trsr_dist.records import Sample


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
        """The scores of a part's users under every system."""
        for name, found in scores.items():
            self.numbers[name].append(self.table.add(found, labels))
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
            self.trims.update({"users": int(bool(user.trims))} | user.trims)

    def model(self) -> ModelScores:
        return ModelScores(np.concatenate(self.scores), np.concatenate(self.labels))


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

    @cached_property
    def _baselines(self) -> Baselines:
        config = self._job.config
        return build_rankers(self._store, config.evaluate.baselines, config.run.seed, self._job.baselines)

    def missing(self, entry: ScoringPass) -> list[int]:
        """Parts of a pass that nobody has scored yet."""
        return self._folders[entry.name].missing(len(self._users))

    def run(self, provenance: dict[str, Any], trained_on_these_shards: bool | None) -> Reduced:
        """All numbers.

        Args:
            provenance: of the model.
            trained_on_these_shards: whether its train users are those of the run; None where that is unknown.

        Raises:
            DataError: the scores do not cover the split exactly, or the store is not the shards' own.
            RunError: a folder has become another evaluation's.
        """
        for folder in self._folders.values():
            folder.check_names(len(self._users))
        settings = self._settings(provenance)
        outcomes, own = Outcomes(OutcomeTable(settings.top_k)), OwnScores()
        for number, part in self._parts("reduce"):
            self._add_own(number, part, outcomes, own)
        systems, model = outcomes.systems(), own.model()
        head = {
            "split": self._job.split,
            "model": self._job.model,
            "candidates": self._job.config.data.candidates,
            "candidate_hash": self._users.candidate_hash,
            "trained_on_these_shards": trained_on_these_shards,
        }
        tail = {
            "protocols": {protocol: self._protocol(protocol, settings) for protocol in self._job.protocols},
            "baseline_training": self._baselines.tuning,
            "trims": dict(sorted(own.trims.items())),
            "provenance": provenance,
        }
        results = head | build_results(systems, model, own.facts, settings) | tail
        for folder in self._folders.values():
            folder.check()
        return Reduced(results, systems, model, own.examples)

    def _add_own(self, number: int, part: range, outcomes: Outcomes, own: OwnScores) -> None:
        samples = [self._users.sample(index) for index in part]
        expected = [expected_of(sample) for sample in samples]
        stored = [self._split.find(user, list(items)) for user, items, _ in expected]
        scored = self._read("", number, expected)
        outcomes.add(self._scores(scored, stored), [user.labels for user in scored["model"]])
        own.add(scored["model"])
        for place, sample in enumerate(samples):
            own.facts.add(user_facts(self._store, sample, stored[place], scored["model"][place].trims))
            if len(own.examples) < NUM_EXAMPLES:  # the first users of the split, whose order is a hash
                model, control = (scored[name][place].scores for name in ("model", "control"))
                own.examples.append(build_example(sample, model, control))

    def _protocol(self, protocol: str, settings: ResultSettings) -> dict[str, Any]:
        """Model, control and the baselines without a language model on one kind of drawn lists."""
        outcomes, candidates = Outcomes(OutcomeTable(settings.top_k)), ListDigest()
        for number, part in self._parts(f"reduce {protocol}"):
            stored = [self._users.stored(protocol, index) for index in part]
            expected = [self._expected(user) for user in stored]
            scored = self._read(protocol, number, expected)
            outcomes.add(self._scores(scored, stored), [user.labels for user in scored["model"]])
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

    def _scores(
        self, scored: Mapping[str, Sequence[UserScores]], stored: Sequence[StoredUser]
    ) -> dict[str, Sequence[np.ndarray]]:
        """Of all systems, those without a language model too."""
        scores = {"random": [np.zeros(len(user.candidates)) for user in stored]}
        scores |= {name: [user.scores for user in found] for name, found in scored.items()}
        return scores | {name: rank_all(ranker, stored) for name, ranker in self._baselines.rankers.items()}

    def _expected(self, user: StoredUser) -> Expected:
        items = [self._store.catalogue.id(item) for item in user.candidates]
        return user.row.user, items, labels_of(user)

    def _settings(self, provenance: dict[str, Any]) -> ResultSettings:
        evaluate, train = self._job.config.evaluate, provenance.get("train", {})
        trained_with = train.get("negatives_per_positive") if has_scale(train.get("loss")) else None
        return ResultSettings(evaluate.top_k, evaluate.bootstrap_samples, self._job.config.run.seed, trained_with)


def expected_of(sample: Sample) -> Expected:
    """User, item ids and labels of a sample."""
    return sample.user, [c.item for c in sample.candidates], [c.label for c in sample.candidates]
