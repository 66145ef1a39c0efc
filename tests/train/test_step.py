"""One rank's step: losses over the whole step, gradients that no split of rows changes, dropout masks, bad rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM

from tests.model.world import ANSWERS, CPU, gradients, make_user, model_config, relative
from trsr_dist.environment import Ranks
from trsr_dist.errors import ModelError
from trsr_dist.hashing import hash64
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.rows import PackedRow, pack_row
from trsr_dist.shards.steps import Step, StreamState
from trsr_dist.train import step as step_module
from trsr_dist.train.lifecycle import Heartbeat
from trsr_dist.train.losses import LossSettings, row_loss
from trsr_dist.train.meter import Sums
from trsr_dist.train.step import StepRunner

TEACHER = [np.float32([1.0, -2.0]), np.float32([0.5]), np.float32([-1.0, 3.0])]
ROWS = [
    pack_row([make_user("a", 9, (3, 2)), make_user("b", 7, (4,))], TEACHER[:2]),
    pack_row([make_user("c", 8, (2, 5))], TEACHER[2:]),
]
"""Five answers of three users."""
EMPTY = pack_row([])


class PlainEngine:
    """What ``StepRunner`` needs of an engine, without DeepSpeed: gradients are added up."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(model_config(num_hidden_layers=1))
        inject_adapter_in_model(LoraConfig(r=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"]), base)
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, 0, 0.5)
            parameter.requires_grad_("lora_" in name)
        self.wrapped: nn.Module = Recommender(base, ANSWERS, "dense").train()
        self.device = CPU
        self.num_backward = 0

    def backward(self, loss: torch.Tensor) -> None:
        self.num_backward += 1
        loss.backward()

    def gradients(self) -> torch.Tensor:
        return gradients(self.wrapped)


def step_of(rows: list[PackedRow], numbers: tuple[int, ...] = (), number: int = 3, answers: int = 5) -> Step:
    state = StreamState(0, 0, 0, number, "", "", "", 100, 2, 1, 0)
    return Step(rows, numbers or tuple(range(len(rows))), answers, 3, 0, state)


def runner(folder: Path, engine: PlainEngine, loss: str = "answer", seed: int = 0) -> StepRunner:
    return StepRunner(engine, LossSettings(loss, ANSWERS, 100), seed, Heartbeat(folder, Ranks(), 100))


def dropped_loss(folder: Path, seed: int = 0, number: int = 0, step: int = 3) -> float:
    """Of the first row, where half of the inputs of the LoRA layers are dropped."""
    found = runner(folder, PlainEngine(dropout=0.5), seed=seed)
    torch.manual_seed(number + 17)  # what else was drawn in this process must not matter
    return found.backward(step_of(ROWS[:1], (number,), step))[0].loss


def test_dropout_masks_differ_by_seed_step_and_row_and_by_nothing_else(tmp_path: Path) -> None:
    first = dropped_loss(tmp_path)
    torch.rand(7)
    assert dropped_loss(tmp_path) == first
    others = {dropped_loss(tmp_path, seed=1), dropped_loss(tmp_path, number=1), dropped_loss(tmp_path, step=4)}
    assert len(others - {first}) == 3


def test_the_seed_of_a_mask_is_a_hash_of_seed_step_and_row(tmp_path: Path) -> None:
    """Of 63 bits, which every generator takes."""
    hashes = [hash64(5, 3, number) for number in range(4)]
    assert max(hashes) >= 2**63 > min(hashes)
    for number, expected in enumerate(hashes):
        runner(tmp_path, PlainEngine(), seed=5).backward(step_of(ROWS[:1], (number,)))
        assert torch.initial_seed() == expected % 2**63


def test_the_heartbeat_says_what_is_done(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, Ranks(), 100)
    found = StepRunner(PlainEngine(), LossSettings("answer", ANSWERS, 100), 0, heartbeat)
    sums, _ = found.backward(step_of(ROWS))
    assert heartbeat._phase[:2] == (3, "row of 15 tokens")
    found.reduce(step_of(ROWS), sums, must_stop=False)
    assert heartbeat._phase[:2] == (3, "sums over ranks")


def test_masks_do_not_depend_on_which_rows_a_rank_runs(tmp_path: Path) -> None:
    together, apart = PlainEngine(dropout=0.5), PlainEngine(dropout=0.5)
    runner(tmp_path, together).backward(step_of(ROWS))
    for number in (1, 0):
        runner(tmp_path, apart).backward(step_of([ROWS[number]], (number,)))
    assert relative(together.gradients(), apart.gradients()) < 1e-5


LOSSES = [("answer", 5), ("full_text", 5), ("pairwise", 3), ("listwise", 3), ("distill", 3)]


@pytest.mark.parametrize(("loss", "weight"), LOSSES)
def test_gradients_are_those_of_the_mean_over_the_step(tmp_path: Path, loss: str, weight: int) -> None:
    """An empty row adds nothing, though it runs."""
    engine, plain = PlainEngine(), PlainEngine()
    found = runner(tmp_path, engine, loss)
    sums, bad = found.backward(step_of([*ROWS, EMPTY]))
    assert (engine.num_backward, bad, sums.num_ranks) == (3, (), 1.0)
    assert (sums.answers, sums.users, sums.places) == (5.0, 3.0, 300.0)
    assert sums.scored == (0.0 if loss == "full_text" else 5.0)
    total = sum(row_loss(plain.wrapped, RowInputs(row, CPU), LossSettings(loss, ANSWERS, 100)).total for row in ROWS)
    (total / weight).backward()
    assert sums.loss == pytest.approx(total.item(), rel=1e-6)
    assert relative(engine.gradients(), plain.gradients()) < 1e-5
    assert found.weight(step_of(ROWS)) == weight


def test_the_sums_over_ranks_get_the_planned_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``weight`` is not added up: every rank plans the same number."""
    devices = []
    monkeypatch.setattr(step_module, "sum_over_ranks", lambda values, device: devices.append(device) or values)
    found = runner(tmp_path, PlainEngine(), "listwise")
    total = found.reduce(step_of(ROWS), Sums(loss=2.0, weight=99.0, stops=7.0), must_stop=True)
    assert total == Sums(loss=2.0, weight=3.0, stops=1.0)
    assert found.reduce(step_of(ROWS), Sums(), must_stop=False).stops == 0.0
    assert devices == [CPU, CPU]


def test_a_loss_that_is_not_finite_spoils_the_gradients_and_names_the_users(tmp_path: Path) -> None:
    engine = PlainEngine()
    own = sorted(set(ROWS[0].token_ids.tolist()) - set(ROWS[1].token_ids.tolist()))
    engine.wrapped.causal.model.embed_tokens.weight.data[own] = float("nan")
    sums, bad = runner(tmp_path, engine).backward(step_of(ROWS))
    assert bad == ("a", "b")
    assert sums.loss != sums.loss and sums.scored == 2.0
    assert engine.gradients().isnan().all()
    engine.wrapped.causal.model.embed_tokens.weight.data[:] = float("nan")
    _, bad = runner(tmp_path, engine).backward(step_of(ROWS))
    assert bad == ("a", "b", "c")


def test_an_infinite_loss_of_one_row_is_no_zero_gradient(tmp_path: Path) -> None:
    """Of -inf - x autograd makes finite gradients, which an optimizer would take."""

    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, inputs: RowInputs, want: str) -> torch.Tensor:
            wide = torch.full((inputs.row.num_answers, 6), -float("inf"))
            wide[:, 5] = 0.0
            return wide + self.weight

    engine = PlainEngine()
    engine.wrapped = Infinite()
    _, bad = runner(tmp_path, engine).backward(step_of(ROWS[1:]))
    assert bad == ("c",) and engine.wrapped.weight.grad.isnan().all()


def test_out_of_memory_names_the_row_and_what_helps(tmp_path: Path) -> None:
    class Full(nn.Module):
        def forward(self, inputs: RowInputs, want: str) -> torch.Tensor:
            assert inputs.device == CPU
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = PlainEngine()
    engine.wrapped = Full()
    with pytest.raises(ModelError, match=r"a row of 15 tokens with 2 answers: lower train\.row_tokens"):
        runner(tmp_path, engine).backward(step_of(ROWS[1:]))
