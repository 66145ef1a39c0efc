"""Passes over the split with a language model: which model, which prompts, which files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trsr_dist.evaluate.control import Change
from trsr_dist.evaluate.parts import assign_parts, split_parts
from trsr_dist.evaluate.scores import ScoreFolder
from trsr_dist.evaluate.scoring import ScoreRow, score_samples
from trsr_dist.evaluate.split import SplitUsers
from trsr_dist.log import progress
from trsr_dist.prompts.builder import PromptBuilder


@dataclass(frozen=True, slots=True)
class ScoringPass:
    """One system that a language model scores."""

    name: str
    source: Literal["model", "base"]
    change: Change = "none"


MODEL_PASS = ScoringPass("model", "model")
OPTIONAL_PASSES = (
    ScoringPass("control", "model", "control"),
    ScoringPass("no_summary", "model", "no_summary"),
    ScoringPass("no_recent", "model", "no_recent"),
    ScoringPass("base", "base"),
)


def plan_passes(baselines: Sequence[str]) -> list[ScoringPass]:
    """The model's own pass and those of the asked baselines that need a language model."""
    return [MODEL_PASS, *(entry for entry in OPTIONAL_PASSES if entry.name in baselines)]


class PartWorker:
    """This process's share of the parts.

    Args:
        users: of the split.
        row_tokens: length limit of a row.
        worker: this process among ``num_workers``: ranks times array tasks.
        num_workers: how many share the parts.
    """

    def __init__(self, users: SplitUsers, row_tokens: int, worker: int, num_workers: int) -> None:
        self._users = users
        self._row_tokens = row_tokens
        self.parts = split_parts(len(users))
        self.mine = assign_parts([users.cost(part) for part in self.parts], num_workers)[worker]

    def run(self, entry: ScoringPass, folder: ScoreFolder, builder: PromptBuilder, score_row: ScoreRow) -> int:
        """Score this worker's parts that are not on disk yet; returns how many those were."""
        todo = [part for part in self.mine if not folder.has(part)]
        for part in progress(todo, description=f"score {entry.name}", unit="part"):
            samples = [self._users.sample(index, entry.change) for index in self.parts[part]]
            folder.write(part, score_samples(samples, builder, score_row, self._row_tokens))
        return len(todo)
