"""Ranks the validation users in the middle of a training, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from trsr_dist.distributed import gather_objects
from trsr_dist.environment import Ranks
from trsr_dist.errors import DataError, ModelError
from trsr_dist.evaluate.metrics import average, check_user, user_metrics
from trsr_dist.evaluate.parts import Lockstep, PartScorer, ScoreRow
from trsr_dist.evaluate.passes import assign_parts, split_parts
from trsr_dist.log import get_logger
from trsr_dist.model.recommender import score_row
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import TokenizedUser, metric_names
from trsr_dist.rows import PackedRow, filler_row
from trsr_dist.shards.reader import ShardSet
from trsr_dist.train.engine import Engine
from trsr_dist.train.lifecycle import LOCKSTEP, METRICS, VALIDATION

log = get_logger("train")


class Validator:
    """The users that are ranked, and this rank's share of them.

    Args:
        shards: of the validation split.
        builder: writes the prompts.
        row_tokens: length limit of a row.
        max_users: at most this many, the first; 0: all.
        top_k: cut-offs of the metrics.
        ranks: this process.
        leave_out: damaged samples are left out and said; False: one ends the training.

    Raises:
        DataError: the split is empty.
        ConfigError: the prompt shows more recent items than the shards have.
    """

    def __init__(
        self,
        shards: ShardSet,
        builder: PromptBuilder,
        row_tokens: int,
        max_users: int,
        top_k: Sequence[int],
        ranks: Ranks,
        leave_out: bool = False,
    ) -> None:
        if not len(shards):
            raise DataError(f"{shards.folder}: no validation users; prepare more, or set train.evaluate_every_steps=0")
        shards.check_recent_items(builder.recent_items)
        self._shards = shards
        self._builder = builder
        self._row_tokens = row_tokens
        self._top_k = tuple(top_k)
        self._leave_out = leave_out
        self.num_users = min(max_users or len(shards), len(shards))
        self._parts = split_parts(self.num_users)
        costs = [int(shards.sizes(part.start, part.stop).sum()) for part in self._parts]
        self._mine = assign_parts(costs, ranks.world_size)[ranks.rank]

    def run(self, engine: Engine, alive: Callable[[str], None]) -> dict[str, float]:
        """Metrics over all users with finite scores, equal on all ranks.

        Args:
            engine: the model.
            alive: called with the phase before each user is read and each row scored, as a sign of life.

        Raises:
            DataError: a sample is damaged; all ranks raise it.
            ModelError: no user has finite scores, or a row does not fit the memory.
        """
        damaged: list[str] = []
        scorers = [PartScorer(self._read(part, damaged, alive), self._row_tokens) for part in self._mine]
        engine.wrapped.eval()
        try:
            self._score(engine, scorers, alive)
        finally:
            engine.wrapped.train()
        alive(METRICS)
        bad: list[str] = []
        rows = {part: self._metrics(scorer, bad) for part, scorer in zip(self._mine, scorers, strict=True)}
        everywhere = gather_objects((rows, damaged, bad))
        self._judge(
            [text for _, found, _ in everywhere for text in found], [text for *_, b in everywhere for text in b]
        )
        parts = {number: values for share, _, _ in everywhere for number, values in share.items()}
        table = [row for number in sorted(parts) for row in parts[number]]
        if not table:
            raise ModelError("validation: no user has finite scores; lower train.learning_rate")
        return dict(zip(metric_names(self._top_k), map(float, average(np.array(table))), strict=True))

    def _read(self, part: int, damaged: list[str], alive: Callable[[str], None]) -> list[TokenizedUser]:
        samples = []
        for index in self._parts[part]:
            alive(VALIDATION)
            try:
                samples.append(self._shards.read(index))
            except DataError as error:
                damaged.append(str(error))
        return [self._builder.build(sample) for sample in samples]

    def _score(self, engine: Engine, scorers: list[PartScorer], alive: Callable[[str], None]) -> None:
        def forward(row: PackedRow) -> np.ndarray:
            alive(VALIDATION if engine.stage < 3 else LOCKSTEP)
            try:
                return score_row(engine.wrapped, row, engine.device)
            except torch.OutOfMemoryError:
                raise ModelError(
                    f"out of memory in the validation, on a row of {row.num_tokens} tokens with {row.num_answers} "
                    "answers: lower evaluate.row_tokens, or take a higher ZeRO stage (train.deepspeed_config)"
                ) from None

        if engine.stage < 3:
            score_parts(scorers, forward)
            return
        together = Lockstep(forward, filler_row(self._builder.answer_ids), engine.device)
        score_parts(scorers, together)
        together.finish()

    def _metrics(self, scorer: PartScorer, bad: list[str]) -> list[np.ndarray]:
        """Of each user with finite scores; what is wrong with the others goes to ``bad``."""
        values = []
        for user, scores in zip(scorer.users, scorer.scores(), strict=True):
            labels = np.array(user.labels, dtype=np.int64)
            try:
                check_user(user.user, scores, labels, user.items)
            except DataError as error:
                bad.append(str(error))
                continue
            values.append(user_metrics(scores, labels, self._top_k))
        return values

    def _judge(self, damaged: list[str], bad: list[str]) -> None:
        if damaged and not self._leave_out:
            raise DataError(damaged[0])
        if damaged or bad:
            log.info("validation leaves out %d users, the first: %s", len(damaged + bad), (damaged + bad)[0])


def score_parts(scorers: list[PartScorer], forward: ScoreRow) -> None:
    """Score all rows of some parts."""
    for scorer in scorers:
        for number, row in enumerate(scorer.rows()):
            scorer.take(number, forward(row))
