"""From samples to scores: rows of a part through a language model, and every score back in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from trsr_dist import distributed
from trsr_dist.config.zero import find_file, read_zero_config
from trsr_dist.environment import Ranks
from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.metrics import check_user
from trsr_dist.evaluate.passes import ScoringPass, pack_part, split_parts
from trsr_dist.evaluate.score_files import ScoreFolder, UserScores
from trsr_dist.evaluate.users import SplitUsers
from trsr_dist.log import get_logger, progress
from trsr_dist.model.loading import ModelPrompts, load_weights, open_prompts
from trsr_dist.model.recommender import score_row
from trsr_dist.model.zero3 import scoring_config
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import Sample, TokenizedUser
from trsr_dist.rows import PackedRow, filler_row, pack_row

ScoreRow = Callable[[PackedRow], np.ndarray]
"""A forward pass: log-odds of a row's answers, float32, shape (num_answers,)."""

log = get_logger("evaluate")


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


def open_models(job: Evaluation) -> dict[str, ModelPrompts]:
    """Prompts by the source of the passes; the base reads those of the model.

    Raises:
        ModelError: a tokenizer cannot be read, or the model has other answers than the config.
    """
    model, prompt = job.config.model, job.config.prompt.model_dump()
    found = open_prompts(job.model, prompt, model.trust_remote_code, model.revision)
    if tuple(found.builder.answers) != tuple(job.config.prompt.answers):
        raise ModelError(
            f"{job.model}: trained to answer {tuple(found.builder.answers)}, prompt.answers is "
            f"{tuple(job.config.prompt.answers)}; set prompt.answers to the model's"
        )
    if not job.has_base:
        return {"model": found}
    base = open_prompts(job.base, prompt, model.trust_remote_code)
    return {"model": found, "base": replace(base, builder=PromptBuilder(base.tokenizer, **found.builder.settings))}


class Scorer:
    """This process's share of the passes of one model: weights are read only where there is something to score.

    Args:
        job: the evaluation.
        source: ``model`` or ``base``.
        prompts: of the model.
        users: of the split.
        parts: that this process scores.
        ranks: this process.
    """

    def __init__(
        self,
        job: Evaluation,
        source: str,
        prompts: ModelPrompts,
        users: SplitUsers,
        parts: Sequence[int],
        ranks: Ranks,
    ) -> None:
        self._job = job
        self._passes = [entry for entry in job.passes if entry.source == source]
        self._prompts = prompts
        self._users = users
        self._parts = parts
        self._device = distributed.device_of(ranks)
        self._zero = zero_config(job.config.evaluate.deepspeed_config, job.precision, self._device)
        self._model: nn.Module | None = None

    def load(self, again: bool = False) -> None:
        """Read the weights where parts are missing (of divided weights: on any rank), or all are scored again."""
        has_work = again or any(not self._job.scores(entry).has(part) for entry in self._passes for part in self._parts)
        if self._zero is not None:
            has_work = distributed.sum_over_ranks([float(has_work)], self._device)[0] > 0
        if not has_work:
            return
        if self._device.type == "cpu":
            # Matrix products split their sums by threads: one thread gives the same digits for any number of ranks.
            torch.set_num_threads(1)
        dtype, attention = getattr(torch, self._job.precision), self._job.config.model.attention
        self._model = load_weights(self._prompts, self._device, dtype, attention, self._zero)

    def run(self, folders: dict[str, ScoreFolder]) -> None:
        """Score what is missing of all passes; the weights are given back at the end."""
        parts = split_parts(len(self._users))
        for entry in self._passes:
            count = self._score(self._model, entry, folders[entry.name], parts) if self._model is not None else 0
            log.info("%s: scored %d of %d parts here", entry.name, count, len(parts))
        self._model = None

    def _score(self, model: nn.Module, entry: ScoringPass, folder: ScoreFolder, parts: Sequence[range]) -> int:
        """Score this process's parts of a pass that are not on disk yet; returns how many those were."""
        builder, row_tokens = self._prompts.builder, self._job.config.evaluate.row_tokens

        def forward(row: PackedRow) -> np.ndarray:
            return score_row(model, row, self._device)

        together = Lockstep(forward, filler_row(builder.answer_ids), self._device)
        todo = [part for part in self._parts if not folder.has(part)]
        num_users = sum(len(parts[part]) for part in todo)
        with progress(total=num_users, description=f"score {entry.name}", unit="user") as bar:
            for part in todo:
                samples = [self._users.sample(index, entry.change, entry.protocol) for index in parts[part]]
                score = forward if self._zero is None else together
                folder.write(part, score_samples(samples, builder, score, row_tokens, bar.update))
        if self._zero is not None:
            together.finish()
        return len(todo)


def zero_config(name: str, precision: str, device: torch.device) -> dict | None:
    """DeepSpeed's config for scoring; None where none is named.

    Raises:
        ConfigError: the file is not of stage 3: the other stages divide nothing that scoring needs.
    """
    if not name:
        return None
    settings = read_zero_config(find_file(name), "evaluate.deepspeed_config")
    stage = settings["zero_optimization"]["stage"]
    if stage != 3:
        raise ConfigError(
            f"evaluate.deepspeed_config={name}: ZeRO stage {stage} divides no weights: nothing is gained; name a "
            "file with stage 3 or leave it empty"
        )
    return scoring_config(settings, precision, device.type == "cuda")
