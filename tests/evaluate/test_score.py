"""Scores of packed rows equal those of prompts that run alone, for few and for thousands of candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.merge.models import load, make_base
from tests.shards.world import make_sample
from tests.tokenizers import byte_level
from trsr_dist.errors import DataError
from trsr_dist.evaluate.parts import PartScorer, score_samples
from trsr_dist.model.attention.backends import choose_backend
from trsr_dist.model.recommender import Recommender, score_row
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import Candidate, Sample
from trsr_dist.rows import PackedRow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(byte_level(chat=True), style="plain", max_tokens=400)


def score_with(base: Path, builder: PromptBuilder, samples: list[Sample], row_tokens: int) -> list[np.ndarray]:
    """Scores of the samples with shared prefixes."""
    backend = choose_backend("auto", CPU, torch.float32, 8)
    model = Recommender(load(base), builder.answer_ids, backend).eval()

    def forward(row: PackedRow) -> np.ndarray:
        return score_row(model, row, CPU)

    counts: list[int] = []
    found = [user.scores for user in score_samples(samples, builder, forward, row_tokens, counts.append)]
    assert sum(counts) == len(samples), "each user is counted once, with the last of the candidates"
    return found


@torch.no_grad()
def score_alone(base: Path, builder: PromptBuilder, sample: Sample, chosen: list[int]) -> np.ndarray:
    """Scores of some candidates, each in a separate plain forward pass."""
    model, user = load(base).eval(), builder.build(sample)
    yes, no = builder.answer_ids
    scores = []
    for place in chosen:
        logits = model(input_ids=torch.tensor([user.prefix + user.suffixes[place]])).logits[0, -1]
        scores.append(float(logits[yes] - logits[no]))
    return np.array(scores, dtype=np.float32)


@pytest.mark.parametrize("row_tokens", [400, 1000, 8192])
def test_packing_does_not_touch_the_scores(base: Path, builder: PromptBuilder, row_tokens: int) -> None:
    samples = [make_sample(number, num_negatives=number) for number in range(1, 9)]
    for sample, found in zip(samples, score_with(base, builder, samples, row_tokens), strict=True):
        expected = score_alone(base, builder, sample, list(range(len(sample.candidates))))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_thousands_of_candidates_of_one_user(base: Path, builder: PromptBuilder) -> None:
    sample = make_sample(1, num_negatives=2999)
    found = score_with(base, builder, [sample], row_tokens=2048)[0]
    chosen = list(range(0, 3000, 50)) + [2999]
    assert np.isfinite(found).all()
    assert len(np.unique(found)) > 2000
    np.testing.assert_allclose(found[chosen], score_alone(base, builder, sample, chosen), atol=1e-4)


def test_users_without_a_positive_and_scores_that_are_no_numbers_are_named(builder: PromptBuilder) -> None:
    sample = make_sample(3)
    negatives = tuple(Candidate(c.item, c.text, 0) for c in sample.candidates)

    def broken(row: PackedRow) -> np.ndarray:
        return np.where(np.arange(row.num_answers) == 2, np.nan, 0.0).astype(np.float32)

    with pytest.raises(DataError, match=r"user 'user/3', item '.*': score nan is not finite.*float32"):
        score_samples([sample], builder, broken, 4096, int)
    part = PartScorer([builder.build(replace(sample, candidates=negatives))], 4096)
    for number, row in enumerate(part.rows()):
        part.take(number, np.zeros(row.num_answers, dtype=np.float32))
    with pytest.raises(DataError, match="user 'user/3': no positive among 7 candidates"):
        part.result()
