"""One optimizer step: rows through the model, sums over the ranks, the update."""

from __future__ import annotations

import math
from dataclasses import astuple

import torch

from trsr_dist.distributed import sum_over_ranks
from trsr_dist.errors import ModelError
from trsr_dist.hashing import hash64
from trsr_dist.model.inputs import RowInputs
from trsr_dist.records import RANKING_LOSSES
from trsr_dist.rows import PackedRow, filler_row
from trsr_dist.shards.steps import Step
from trsr_dist.train.engine import Engine
from trsr_dist.train.lifecycle import ROW, SUMS, Heartbeat
from trsr_dist.train.losses import LossSettings, RowLoss, row_loss
from trsr_dist.train.meter import Sums


def learning_rate(step: int, num_steps: int, peak: float, warmup_ratio: float, schedule: str) -> float:
    """Rate of step ``step`` (from 0) of ``num_steps``.

    Rises linearly to ``peak`` over the warm-up, whose first step is not 0; then stays (constant), or falls to 0 at the
    end linearly or along a half cosine.
    """
    warmup = round(num_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


class StepRunner:
    """Runs steps on one rank.

    Args:
        engine: whose model runs.
        loss: of its rows.
        seed: of dropout masks.
        heartbeat: of this rank.
    """

    def __init__(self, engine: Engine, loss: LossSettings, seed: int, heartbeat: Heartbeat) -> None:
        self._engine = engine
        self._loss = loss
        self._seed = seed
        self._heartbeat = heartbeat
        self._filler = filler_row(loss.answer_ids)

    def backward(self, step: Step) -> tuple[Sums, tuple[str, ...]]:
        """Forward and backward of this rank's rows; returns its own sums and the users of rows with a bad loss."""
        sums = Sums(num_ranks=1.0, errors=len(step.errors))
        results = []
        for row, number in zip(step.rows, step.numbers, strict=True):
            self._heartbeat.at(step.state.step, f"{ROW} of {row.num_tokens} tokens")
            results.append(self._run_row(row, step.state.step, number, self.weight(step)))
            sums.add_row(row, self._loss.row_tokens)
        # Read back after the last row: until then the GPU need not wait for this process.
        bad: list[str] = []
        for row, result in zip(step.rows, results, strict=True):
            if row.num_answers:
                loss = float(result.total)
                sums.loss += loss
                if not math.isfinite(loss):
                    bad += row.users
                elif result.log_odds is not None:
                    sums.add_scores(result.log_odds.cpu(), torch.from_numpy(row.labels), torch.from_numpy(row.group))
        return sums, tuple(bad)

    def reduce(self, step: Step, sums: Sums, must_stop: bool) -> Sums:
        """Sums over the ranks."""
        self._heartbeat.at(step.state.step, SUMS)
        sums.stops = float(must_stop)
        total = Sums(*sum_over_ranks(astuple(sums), self._engine.device))
        total.weight = self.weight(step)
        return total

    def weight(self, step: Step) -> int:
        """What the step's loss is divided by: users or answers over all ranks."""
        return step.num_users if self._loss.name in RANKING_LOSSES else step.num_answers

    def _run_row(self, row: PackedRow, step: int, number: int, weight: int) -> RowLoss:
        """Returns the row's loss without its graph."""
        # Masks depend on the row, not on the rank: the world size does not change them.
        torch.manual_seed(hash64(self._seed, step, number) % 2**63)
        inputs = RowInputs(row if row.num_answers else self._filler, self._engine.device)
        try:
            result = row_loss(self._engine.wrapped, inputs, self._loss)
            share = result.total / weight if row.num_answers else result.total * 0.0
            # A loss that is not finite must spoil the gradients too, so that all ranks skip the step.
            self._engine.backward(share * torch.where(torch.isfinite(share), 1.0, float("nan")))
        except torch.OutOfMemoryError:
            raise ModelError(
                f"out of memory on a row of {row.num_tokens} tokens with {row.num_answers} answers: lower "
                "train.row_tokens, set train.activation_checkpointing=true, or take a higher ZeRO stage "
                "(train.deepspeed_config=ds_configs/zero3.json)"
            ) from None
        return RowLoss(result.total.detach(), result.log_odds)
