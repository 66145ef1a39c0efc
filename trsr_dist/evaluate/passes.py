"""Passes over the split with a language model: which model, which prompts, which files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from trsr_dist.evaluate.control import Change
from trsr_dist.evaluate.lockstep import Lockstep
from trsr_dist.evaluate.parts import assign_parts, split_parts
from trsr_dist.evaluate.scores import ScoreFolder
from trsr_dist.evaluate.scoring import ScoreRow, score_samples
from trsr_dist.evaluate.split import SplitUsers
from trsr_dist.log import progress
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.rows import pack_row


@dataclass(frozen=True, slots=True)
class ScoringPass:
    """One system that a language model scores on one candidate list."""

    system: str
    source: Literal["model", "base"] = "model"
    change: Change = "none"
    protocol: str = ""
    """Of the candidates; empty: the shards' own."""

    @property
    def name(self) -> str:
        """Folder of the scores, below the split's."""
        return f"{self.protocol}/{self.system}" if self.protocol else self.system


ALWAYS = (ScoringPass("model"), ScoringPass("control", change="control"))
OPTIONAL = (
    ScoringPass("no_summary", change="no_summary"),
    ScoringPass("no_recent", change="no_recent"),
    ScoringPass("base", source="base"),
)


def drawn_protocols(asked: Sequence[str], own: str) -> list[str]:
    """Candidate lists that are drawn beside the shards' ``own``; of the same kind they would say nothing new."""
    return [name for name in asked if name != own]


def plan_passes(baselines: Sequence[str], protocols: Sequence[str]) -> list[ScoringPass]:
    """Model and control on every candidate list, and the asked baselines that need a language model on the own one."""
    asked = [entry for entry in OPTIONAL if entry.system in baselines]
    return [*ALWAYS, *asked, *(replace(entry, protocol=protocol) for protocol in protocols for entry in ALWAYS)]


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
            samples = [self._users.sample(index, entry.change, entry.protocol) for index in self.parts[part]]
            folder.write(part, score_samples(samples, builder, score_row, self._row_tokens))
        return len(todo)

    def run_together(
        self, entry: ScoringPass, folder: ScoreFolder, builder: PromptBuilder, score_row: ScoreRow, device: torch.device
    ) -> int:
        """As ``run``, for a model whose weights lie divided over the ranks."""
        first = builder.build(self._users.sample(0, entry.change, entry.protocol))
        forward = Lockstep(score_row, pack_row([first.choose([0])]), device)
        count = self.run(entry, folder, builder, forward)
        forward.finish()
        return count
