"""Ranks the validation users in the middle of a training, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trsr_dist.distributed import gather_objects
from trsr_dist.environment import Ranks
from trsr_dist.evaluate.lockstep import Lockstep
from trsr_dist.evaluate.metrics import average, metric_names, user_metrics
from trsr_dist.evaluate.parts import assign_parts, split_parts
from trsr_dist.evaluate.scoring import PartScorer, ScoreRow
from trsr_dist.model.forward import score_row
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.rows import PackedRow, pack_row
from trsr_dist.shards.reader import ShardSet
from trsr_dist.train.engine import Engine


class Validator:
    """The users that are ranked, and this rank's share of them.

    Args:
        shards: of the validation split.
        builder: writes the prompts.
        row_tokens: length limit of a row.
        max_users: only the first so many; 0: all.
        top_k: cut-offs of the metrics.
        ranks: this process.
    """

    def __init__(
        self,
        shards: ShardSet,
        builder: PromptBuilder,
        row_tokens: int,
        max_users: int,
        top_k: Sequence[int],
        ranks: Ranks,
    ) -> None:
        self._shards = shards
        self._builder = builder
        self._row_tokens = row_tokens
        self._top_k = tuple(top_k)
        self.num_users = min(max_users or len(shards), len(shards))
        self._parts = split_parts(self.num_users)
        costs = [int(shards.sizes(part.start, part.stop).sum()) for part in self._parts]
        self._mine = assign_parts(costs, ranks.world_size)[ranks.rank]

    def run(self, engine: Engine, alive: Callable[[], None]) -> dict[str, float]:
        """Metrics over all users, equal on all ranks; ``alive`` is called before each row, as a sign of life."""
        scorers = [self._scorer(part) for part in self._mine]
        engine.wrapped.eval()
        try:
            self._score(engine, scorers, alive)
        finally:
            engine.wrapped.train()
        values = [user_metrics(user.scores, user.labels, self._top_k) for scorer in scorers for user in scorer.result()]
        everywhere = gather_objects(dict(zip(self._mine, _by_part(values, scorers), strict=True)))
        parts = {number: rows for share in everywhere for number, rows in share.items()}
        table = np.concatenate([parts[number] for number in sorted(parts)])
        return dict(zip(metric_names(self._top_k), map(float, average(table)), strict=True))

    def _scorer(self, part: int) -> PartScorer:
        return PartScorer(self._shards.read_many(self._parts[part]), self._builder, self._row_tokens)

    def _score(self, engine: Engine, scorers: list[PartScorer], alive: Callable[[], None]) -> None:
        def forward(row: PackedRow) -> np.ndarray:
            alive()
            return score_row(engine.wrapped, row, engine.device)

        if engine.stage < 3:
            score_parts(scorers, forward)
            return
        filler = self._builder.build(self._shards.read(0)).choose([0])
        together = Lockstep(forward, pack_row([filler]), engine.device)
        score_parts(scorers, together)
        together.finish()


def score_parts(scorers: list[PartScorer], forward: ScoreRow) -> None:
    """Score all rows of some parts."""
    for scorer in scorers:
        for number, row in enumerate(scorer.rows()):
            scorer.take(number, forward(row))


def _by_part(values: list[np.ndarray], scorers: list[PartScorer]) -> list[np.ndarray]:
    rows = iter(values)
    return [np.array([next(rows) for _ in scorer.users]) for scorer in scorers]
