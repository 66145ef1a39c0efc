"""Losses of one row, as sums: the caller divides by counts over all ranks, so that no split of the work matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from trsr_dist.model.inputs import RowInputs, text_targets
from trsr_dist.model.recommender import Want

WANTS: dict[str, Want] = {
    "answer": "logits",
    "full_text": "text",
    "pairwise": "pair",
    "listwise": "pair",
    "distill": "pair",
}
"""What each loss asks of the model."""


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What a row's loss is made of, beside the row."""

    name: str
    """``train.loss``."""
    answer_ids: tuple[int, int]
    """Tokens of yes and no."""
    row_tokens: int
    """What a row of this run can hold."""
    teacher_weight: float = 0.0
    """Of ``distill_sum``."""
    temperature: float = 1.0
    """Of ``distill_sum``."""


@dataclass(frozen=True, slots=True)
class RowLoss:
    """A row's loss and what is watched beside it."""

    total: torch.Tensor
    """Scalar with a gradient: the sum over answers (answer, full_text) or users (the others)."""
    log_odds: torch.Tensor | None
    """float32, shape (num_answers,), without a gradient; None where the loss does not compute them."""


def row_loss(model: torch.nn.Module, inputs: RowInputs, settings: LossSettings) -> RowLoss:
    """Run the model on a row and sum its loss.

    Args:
        model: a ``Recommender``, or DeepSpeed's engine around it.
        inputs: the row.
        settings: of the loss.
    """
    loss, want = settings.name, WANTS[settings.name]
    if want == "text":
        targets = text_targets(inputs.row, settings.answer_ids, inputs.device, settings.row_tokens)
        return RowLoss(model(inputs, want, targets), None)
    output = model(inputs, want)
    if want == "logits":
        yes, no = settings.answer_ids
        targets = torch.where(inputs.labels > 0, yes, no)
        logits = output.float()
        log_odds = (logits[:, yes] - logits[:, no]).detach()
        return RowLoss(cross_entropy(logits, targets, reduction="sum"), log_odds)
    log_odds = output[:, 0] - output[:, 1]
    labels, group = inputs.labels, inputs.group
    if loss == "distill":
        total = distill_sum(log_odds, inputs.teacher, labels, group, settings.teacher_weight, settings.temperature)
    else:
        total = (pairwise_sum if loss == "pairwise" else listwise_sum)(log_odds, labels, group)
    return RowLoss(total, log_odds.detach())


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
    positives = labels > 0
    counts = ((group[:, None] == group[None]) & positives[None]).sum(1).clamp(min=1)
    return (-_log_softmax(log_odds, group) / counts).where(positives, 0.0).sum()


def distill_sum(
    log_odds: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    group: torch.Tensor,
    teacher_weight: float,
    temperature: float,
) -> torch.Tensor:
    """Sum over users of ``(1 - w)`` times the listwise loss and ``w T^2`` times KL(teacher || student).

    The divergence is that of the softmax over the user's candidates at temperature T; T^2 keeps its gradients at the
    size of the other term's (Hinton et al., arXiv 1503.02531). Only differences within a user count.

    Args:
        log_odds: the student's, float32, shape (num_answers,).
        teacher: the teacher's, float32, shape (num_answers,).
        labels: shape (num_answers,): above 0 for positives.
        group: shape (num_answers,): the user.
        teacher_weight: w, from 0 to 1.
        temperature: T, above 0.
    """
    ours, theirs = _log_softmax(log_odds / temperature, group), _log_softmax(teacher / temperature, group)
    divergence = (theirs.exp() * (theirs - ours)).sum()
    hard = listwise_sum(log_odds, labels, group)
    return (1 - teacher_weight) * hard + teacher_weight * temperature**2 * divergence


def _log_softmax(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Over the scores of each group; float32, shape (num_answers,)."""
    others = group[:, None] != group[None]
    return scores - scores[None].expand(len(group), -1).masked_fill(others, float("-inf")).logsumexp(1)
