"""From prompts to scores: rows of a part through a forward pass, and every score back in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from trsr_dist import distributed
from trsr_dist.evaluate.metrics import check_user
from trsr_dist.evaluate.passes import pack_part
from trsr_dist.evaluate.score_files import UserScores
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import Sample, TokenizedUser
from trsr_dist.rows import PackedRow, pack_row

ScoreRow = Callable[[PackedRow], np.ndarray]
"""A forward pass: log-odds of a row's answers, float32, shape (num_answers,)."""


class PartScorer:
    """The rows of some users and the scores that come back for them.

    Args:
        users: the prompts of one part of a split.
        row_tokens: length limit of a row.
    """

    def __init__(self, users: Sequence[TokenizedUser], row_tokens: int) -> None:
        self.users = users
        self._rows = pack_part(users, row_tokens)
        self._scores = [np.full(len(user.suffixes), np.nan, dtype=np.float32) for user in self.users]

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> Iterator[PackedRow]:
        """The packed rows, in the order in which ``take`` expects their scores."""
        return (pack_row([self.users[entry.user].choose(entry.candidates) for entry in row]) for row in self._rows)

    def take(self, row: int, scores: np.ndarray) -> int:
        """Keep the scores of a row, shape (num_answers,); returns how many users have all of theirs now."""
        start = 0
        for entry in self._rows[row]:
            stop = start + len(entry.candidates)
            self._scores[entry.user][list(entry.candidates)] = scores[start:stop]
            start = stop
        return sum(not np.isnan(self._scores[user]).any() for user in {entry.user for entry in self._rows[row]})

    def scores(self) -> list[np.ndarray]:
        """float32 log-odds of every user's candidates, in the order of the users; NaN where none was taken."""
        return self._scores

    def result(self) -> list[UserScores]:
        """Scores of all users, in their order.

        Raises:
            DataError: a score is not finite, or a user has no positive.
        """
        found = []
        for user, scores in zip(self.users, self._scores, strict=True):
            labels = np.array(user.labels, dtype=np.int64)
            check_user(user.user, scores, labels, user.items)
            found.append(UserScores(user.user, user.items, labels, scores, user.trims))
        return found


def score_samples(
    samples: Sequence[Sample],
    builder: PromptBuilder,
    score_row: ScoreRow,
    row_tokens: int,
    count: Callable[[int], object],
) -> list[UserScores]:
    """Scores of the samples' candidates, in the order of the samples; ``count`` is told after each row how many users
    it has finished."""
    part = PartScorer([builder.build(sample) for sample in samples], row_tokens)
    for number, row in enumerate(part.rows()):
        count(part.take(number, score_row(row)))
    return part.result()


class Lockstep:
    """A forward pass that all ranks make together, as ZeRO-3 demands (they gather each layer's weights in common), for
    ranks that have different numbers of rows.

    Args:
        forward: the pass itself.
        filler: a row that a rank runs while others still have rows of their own.
        device: of the collectives.
    """

    def __init__(self, forward: ScoreRow, filler: PackedRow, device: torch.device) -> None:
        self._forward = forward
        self._filler = filler
        self._device = device

    def __call__(self, row: PackedRow) -> np.ndarray:
        """Scores of a row of this rank."""
        self._is_wanted(True)
        return self._forward(row)

    def finish(self) -> None:
        """This rank has no more rows: go along until none has."""
        while self._is_wanted(False):
            self._forward(self._filler)

    def _is_wanted(self, here: bool) -> bool:
        return distributed.sum_over_ranks([float(here)], self._device)[0] > 0
