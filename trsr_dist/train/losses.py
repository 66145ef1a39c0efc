"""Losses of one row, as sums: the caller divides by counts over all ranks, so that no split of the work matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Want
from trsr_dist.model.text_targets import text_targets

WANTS: dict[str, Want] = {"answer": "logits", "full_text": "text", "pairwise": "pair", "listwise": "pair"}
"""What each loss asks of the model."""
PER_USER = ("pairwise", "listwise")
"""Losses that are averaged over users; the others over answers."""


@dataclass(frozen=True, slots=True)
class RowLoss:
    """A row's loss and what is watched beside it."""

    total: torch.Tensor
    """Scalar with a gradient: the sum over answers (answer, full_text) or users (pairwise, listwise)."""
    log_odds: torch.Tensor | None
    """float32, shape (num_answers,), without a gradient; None where the loss does not compute them."""


def row_loss(
    model: torch.nn.Module, inputs: RowInputs, loss: str, answer_ids: tuple[int, int], row_tokens: int
) -> RowLoss:
    """Run the model on a row and sum its loss.

    Args:
        model: a ``Recommender``, or DeepSpeed's engine around it.
        inputs: the row.
        loss: ``train.loss``.
        answer_ids: tokens of yes and no.
        row_tokens: what a row of this run can hold.
    """
    want = WANTS[loss]
    if want == "text":
        targets = text_targets(inputs.row, answer_ids, inputs.device, row_tokens)
        return RowLoss(model(inputs, want, targets), None)
    output = model(inputs, want)
    if want == "logits":
        yes, no = answer_ids
        targets = torch.where(inputs.labels > 0, yes, no)
        logits = output.float()
        log_odds = (logits[:, yes] - logits[:, no]).detach()
        return RowLoss(cross_entropy(logits, targets, reduction="sum"), log_odds)
    log_odds = output[:, 0] - output[:, 1]
    sums = pairwise_sum if loss == "pairwise" else listwise_sum
    return RowLoss(sums(log_odds, inputs.labels, inputs.group), log_odds.detach())


def pairwise_sum(log_odds: torch.Tensor, labels: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Sum over users of the mean of -log sigmoid(s+ - s-) over the user's pairs (BPR, arXiv 1205.2618).

    Args:
        log_odds: float32, shape (num_answers,).
        labels: shape (num_answers,): above 0 for positives.
        group: shape (num_answers,): the user.
    """
    pairs = (group[:, None] == group[None]) & (labels[:, None] > 0) & (labels[None] <= 0)
    counts = pairs.sum(1).new_zeros(len(labels)).index_add_(0, group, pairs.sum(1))[group].clamp(min=1)
    losses = -logsigmoid(log_odds[:, None] - log_odds[None]) / counts[:, None]
    return losses.where(pairs, 0.0).sum()  # an index would wait for the GPU to count the pairs


def listwise_sum(log_odds: torch.Tensor, labels: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Sum over users of the mean over positives of -log softmax over the user's candidates (ListNet, ICML 2007).

    Args:
        log_odds: float32, shape (num_answers,).
        labels: shape (num_answers,): above 0 for positives.
        group: shape (num_answers,): the user.
    """
    same = group[:, None] == group[None]
    normalizers = log_odds[None].expand(len(labels), -1).masked_fill(~same, float("-inf")).logsumexp(1)
    positives = labels > 0
    counts = (same & positives[None]).sum(1).clamp(min=1)
    return ((normalizers - log_odds) / counts).where(positives, 0.0).sum()
