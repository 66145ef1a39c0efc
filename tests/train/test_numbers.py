"""Learning rates, losses and watched scalars against values worked out by hand or by plain loops."""

from __future__ import annotations

import math
import random
from dataclasses import astuple, fields
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from tests.model.world import ANSWERS, CPU, make_model, make_user, model_config, recommender
from trsr_dist.model.inputs import RowInputs, separate_prompts
from trsr_dist.records import RANKING_LOSSES
from trsr_dist.rows import PackedRow, pack_row
from trsr_dist.train.losses import LossSettings, RowLoss, distill_sum, listwise_sum, pairwise_sum, row_loss
from trsr_dist.train.meter import Sums, count_pairs, scalars
from trsr_dist.train.model import peak_flops
from trsr_dist.train.step import learning_rate


class TestSchedule:
    rise = (0.2, 0.4, 0.6, 0.8)
    """Of the peak, over a warm-up of four steps."""
    fall = {
        "constant": (1.0,) * 6,
        "linear": (1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6),
        # cos of 0, 30, 60, 90, 120 and 150 degrees
        "cosine": (1.0, (2 + math.sqrt(3)) / 4, 0.75, 0.5, 0.25, (2 - math.sqrt(3)) / 4),
    }

    @pytest.mark.parametrize("schedule", fall)
    def test_every_step_of_ten(self, schedule: str) -> None:
        rates = [learning_rate(step, 10, 3.0, 0.4, schedule) for step in range(10)]
        assert rates == pytest.approx([3.0 * rate for rate in self.rise + self.fall[schedule]])

    @pytest.mark.parametrize(("schedule", "end"), [("constant", 2.0), ("linear", 0.0), ("cosine", 0.0)])
    def test_after_the_end_it_stays(self, schedule: str, end: float) -> None:
        assert [learning_rate(step, 4, 2.0, 0.0, schedule) for step in (4, 5, 9)] == pytest.approx([end] * 3)

    def test_a_warm_up_of_all_steps_reaches_the_peak_after_the_last(self) -> None:
        rates = [learning_rate(step, 3, 1.0, 1.0, "linear") for step in range(5)]
        assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.0])


def scores_of(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-odds with ties, labels and users of 12 answers; users 0 to 4 in a mixed order, one may lack positives."""
    draw = random.Random(seed)
    log_odds = torch.tensor([draw.choice([-1.5, -0.5, 0.0, 0.5, 2.0]) for _ in range(12)])
    return log_odds, torch.tensor([draw.randrange(2) for _ in range(12)]), torch.tensor([i % 5 for i in range(12)])


def users_of(log_odds: torch.Tensor, labels: torch.Tensor, group: torch.Tensor) -> list[tuple[list, list]]:
    """Scores of the positives and of the negatives, by user."""
    rows = list(zip(log_odds.tolist(), labels.tolist(), group.tolist(), strict=True))
    return [tuple([s for s, y, g in rows if (g, y) == (user, label)] for label in (1, 0)) for user in range(5)]


@pytest.mark.parametrize("seed", range(5))
class TestAnyScores:
    def test_auc(self, seed: int) -> None:
        sums = Sums()
        sums.add_scores(*scores_of(seed))
        pairs = [pair for high, low in users_of(*scores_of(seed)) for pair in product(high, low)]
        right = sum(1.0 if high > low else 0.5 if high == low else 0.0 for high, low in pairs)
        assert (sums.right_pairs, sums.pairs) == (right, len(pairs))
        assert (sums.scored, sums.yes) == (12, sum(score > 0 for score in scores_of(seed)[0].tolist()))

    def test_pairwise(self, seed: int) -> None:
        expected = 0.0
        for high, low in users_of(*scores_of(seed)):
            losses = [math.log(1 + math.exp(b - a)) for a, b in product(high, low)]
            expected += sum(losses) / max(1, len(losses))
        assert pairwise_sum(*scores_of(seed)).item() == pytest.approx(expected, rel=1e-5)

    def test_listwise(self, seed: int) -> None:
        expected = 0.0
        for high, low in users_of(*scores_of(seed)):
            total = sum(map(math.exp, high + low))
            losses = [-math.log(math.exp(score) / total) for score in high]
            expected += sum(losses) / max(1, len(losses))
        assert listwise_sum(*scores_of(seed)).item() == pytest.approx(expected, rel=1e-5)


def test_ties_count_half_and_a_better_negative_nothing() -> None:
    """Of 7 pairs 4 are right, one is a tie, two are wrong; across users there are none."""
    sums = Sums(right_pairs=10.0, pairs=20.0, scored=1.0, yes=1.0)
    log_odds = torch.tensor([1.0, 0.0, 1.0, -1.0, 0.5, 0.5, -2.0])
    labels, group = torch.tensor([1, 1, 0, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 0, 0, 1, 1])
    sums.add_scores(log_odds, labels, group)
    assert (sums.right_pairs, sums.pairs, sums.scored, sums.yes) == (14.5, 27.0, 8.0, 5.0)


def test_what_a_row_adds() -> None:
    """Heads 3, prefixes 7 and 5, suffixes 2, 4 and 3: 3 + 4 + 2 + 9 tokens instead of 9 + 11 + 8."""
    row = pack_row([make_user("a", 7, (2, 4), head=3), make_user("b", 5, (3,), head=3)])
    sums = Sums(tokens=100.0, places=1.0, users=1.0, answers=1.0, separate_tokens=1.0, attended_pairs=1.0)
    sums.add_row(row, 50)
    head, first, second = 6, 4 * 3 + 10, 2 * 3 + 3
    suffixes = (7 * 2 + 3) + (7 * 4 + 10) + (5 * 3 + 6)
    assert count_pairs(row) == head + first + second + suffixes
    assert isinstance(count_pairs(row), int)
    assert (sums.answers, sums.users, sums.tokens, sums.places) == (4.0, 3.0, 118.0, 51.0)
    assert sums.separate_tokens == 1 + 28
    assert sums.attended_pairs == 1 + count_pairs(row)


def test_sums_add_up_field_by_field() -> None:
    names = [field.name for field in fields(Sums)]
    one, two = (Sums(**{name: start + i for i, name in enumerate(names)}) for start in (1.0, 100.0))
    one.add(two)
    assert list(astuple(one)) == [101.0 + 2 * i for i in range(len(names))]
    assert list(astuple(Sums())) == [0.0] * len(names)


def test_scalars_by_hand() -> None:
    sums = Sums(
        loss=6.0, weight=4.0, scored=8.0, yes=2.0, right_pairs=9.0, pairs=12.0, users=10.0, tokens=300.0,
        separate_tokens=900.0, places=400.0, wait_seconds=3.0, num_ranks=2.0,
    )  # fmt: skip
    assert scalars(sums, 5.0, 40.0, 16.0) == {
        "train/tokens_per_second": 60.0,
        "train/users_per_second": 2.0,
        "train/flops_per_second": 8.0,
        "train/row_fill": 0.75,
        "train/sharing_gain": 3.0,
        "train/data_wait_share": pytest.approx(0.3),
        "train/loss": 1.5,
        "train/yes_rate": 0.25,
        "train/auc": 0.75,
        "train/mfu": 0.5,
    }


def test_the_peak_is_that_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training in float32 is no tenth as busy as one in bfloat16."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert [peak_flops(2, precision) for precision in ("bfloat16", "float32")] == [2 * 989e12, 2 * 67e12]


def test_what_is_not_known_is_not_said() -> None:
    """A step of empty rows divides by nothing."""
    values = scalars(Sums(tokens=0.5, separate_tokens=0.25, places=0.5, wait_seconds=0.5, num_ranks=0.5), 2.0, 4.0, 0.0)
    assert not values.keys() & {"train/loss", "train/yes_rate", "train/auc", "train/mfu"}
    assert (values["train/row_fill"], values["train/sharing_gain"]) == (0.5, 0.25)
    assert values["train/data_wait_share"] == 0.25


@pytest.fixture(scope="module")
def row() -> PackedRow:
    teacher = [np.float32([0.5, -1.0, 2.0]), np.float32([-3.0, 0.0])]
    return pack_row([make_user("a", 20, (3, 6, 4), 5), make_user("b", 12, (5, 2), 5)], teacher)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return make_model(model_config(num_hidden_layers=1))


@pytest.fixture(scope="module")
def logits(base: nn.Module, row: PackedRow) -> list[torch.Tensor]:
    """Of all tokens of each prompt, float32 [tokens, vocabulary]."""
    with torch.no_grad():
        return [base(input_ids=torch.from_numpy(prompt)[None]).logits[0] for prompt in separate_prompts(row)]


class TestRowLoss:
    """The losses of a real model's row equal those of its prompts one by one."""

    def run(self, base: nn.Module, row: PackedRow, loss: str) -> RowLoss:
        return row_loss(recommender(base, "dense"), RowInputs(row, CPU), LossSettings(loss, ANSWERS, 100, 0.6, 2.0))

    def test_answer(self, base: nn.Module, row: PackedRow, logits: list[torch.Tensor]) -> None:
        found = self.run(base, row, "answer")
        last = [values[-1] for values in logits]
        wanted = [ANSWERS[0] if label else ANSWERS[1] for label in row.labels]
        expected = -sum(values.log_softmax(0)[token].item() for values, token in zip(last, wanted, strict=True))
        assert found.total.item() == pytest.approx(expected, rel=1e-4)
        log_odds = [(values[ANSWERS[0]] - values[ANSWERS[1]]).item() for values in last]
        assert found.log_odds.tolist() == pytest.approx(log_odds, rel=1e-3, abs=1e-5)
        assert found.total.requires_grad and not found.log_odds.requires_grad

    def test_full_text(self, base: nn.Module, row: PackedRow, logits: list[torch.Tensor]) -> None:
        found = self.run(base, row, "full_text")
        expected = 0.0
        for prompt, label, values in zip(separate_prompts(row), row.labels, logits, strict=True):
            text = torch.tensor([*prompt, ANSWERS[0] if label else ANSWERS[1]])
            expected += nn.functional.cross_entropy(values, text[1:]).item()
        assert found.total.item() == pytest.approx(expected, rel=1e-4)
        assert found.log_odds is None and found.total.requires_grad

    @pytest.mark.parametrize("loss", RANKING_LOSSES)
    def test_over_users(self, base: nn.Module, row: PackedRow, logits: list[torch.Tensor], loss: str) -> None:
        found = self.run(base, row, loss)
        log_odds = torch.stack([values[-1][ANSWERS[0]] - values[-1][ANSWERS[1]] for values in logits])
        labels, group = torch.from_numpy(row.labels), torch.from_numpy(row.group)
        if loss == "distill":
            expected = distill_sum(log_odds, torch.from_numpy(row.teacher), labels, group, 0.6, 2.0).item()
        else:
            expected = {"pairwise": pairwise_sum, "listwise": listwise_sum}[loss](log_odds, labels, group).item()
        assert found.total.item() == pytest.approx(expected, rel=1e-4)
        assert found.log_odds.tolist() == pytest.approx(log_odds.tolist(), rel=1e-3, abs=1e-5)
        assert found.total.requires_grad and not found.log_odds.requires_grad
