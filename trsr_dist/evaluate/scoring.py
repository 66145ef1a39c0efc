"""From samples to scores with a given model: pack, run forwards, put every score back in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trsr_dist.evaluate.metrics import check_user
from trsr_dist.evaluate.parts import RowEntry, pack_part
from trsr_dist.evaluate.score_files import UserScores
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import Sample, TokenizedUser
from trsr_dist.rows import PackedRow, pack_row

ScoreRow = Callable[[PackedRow], np.ndarray]
"""A forward pass: log-odds of a row's answers, float32, shape (num_answers,)."""


class PartScorer:
    """The rows of some samples and the scores that come back for them.

    Args:
        samples: one part of a split.
        builder: of the model's prompts.
        row_tokens: length limit of a row.
    """

    def __init__(self, samples: Sequence[Sample], builder: PromptBuilder, row_tokens: int) -> None:
        self.users = [builder.build(sample) for sample in samples]
        self._plan = pack_part(self.users, row_tokens)
        self._scores = [np.full(len(user.suffixes), np.nan, dtype=np.float32) for user in self.users]

    def __len__(self) -> int:
        return len(self._plan)

    def rows(self) -> Iterator[PackedRow]:
        """The packed rows, in the order in which ``take`` expects their scores."""
        return (pack_row([self._chosen(entry) for entry in row]) for row in self._plan)

    def take(self, row: int, scores: np.ndarray) -> None:
        """Keep the scores of a row, shape (num_answers,)."""
        start = 0
        for entry in self._plan[row]:
            stop = start + len(entry.candidates)
            self._scores[entry.user][list(entry.candidates)] = scores[start:stop]
            start = stop

    def scores(self) -> list[np.ndarray]:
        """float32 log-odds of every user's candidates, in the order of the samples; NaN where none was taken."""
        return self._scores

    def result(self) -> list[UserScores]:
        """Scores of all users, in the order of the samples.

        Raises:
            DataError: a score is not finite, or a user has no positive.
        """
        return [self._checked(user, scores) for user, scores in zip(self.users, self._scores, strict=True)]

    def _checked(self, user: TokenizedUser, scores: np.ndarray) -> UserScores:
        labels = np.array(user.labels, dtype=np.int64)
        check_user(user.user, scores, labels, user.items)
        return UserScores(user.user, user.items, labels, scores, user.trims)

    def _chosen(self, entry: RowEntry) -> TokenizedUser:
        return self.users[entry.user].choose(entry.candidates)


def score_samples(
    samples: Sequence[Sample], builder: PromptBuilder, score_row: ScoreRow, row_tokens: int
) -> list[UserScores]:
    """Scores of the samples' candidates, in the order of the samples."""
    part = PartScorer(samples, builder, row_tokens)
    for number, row in enumerate(part.rows()):
        part.take(number, score_row(row))
    return part.result()
