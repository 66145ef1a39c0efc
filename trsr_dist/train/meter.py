"""What is watched while training: sums over rows and ranks, and the scalars made of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from trsr_dist.rows import PackedRow


@dataclass(slots=True)
class Sums:
    """Added up over the rows of a step, over ranks, and over the steps between two log lines."""

    loss: float = 0.0
    """Unnormalized: over answers or users."""
    weight: float = 0.0
    """What the loss is divided by: answers or users, as planned; 0: no loss is known."""
    answers: float = 0.0
    scored: float = 0.0
    """Answers whose log-odds are known."""
    yes: float = 0.0
    """Answers with log-odds above 0."""
    right_pairs: float = 0.0
    pairs: float = 0.0
    """Pairs of a positive and a negative of one user."""
    users: float = 0.0
    tokens: float = 0.0
    """In the rows, shared parts once."""
    separate_tokens: float = 0.0
    """Of the same prompts as separate sequences."""
    attended_pairs: float = 0.0
    """Query-key pairs."""
    places: float = 0.0
    """Tokens that the rows could hold."""
    wait_seconds: float = 0.0
    """For data, summed over ranks."""
    num_ranks: float = 0.0
    errors: float = 0.0
    """Damaged samples that were left out."""
    stops: float = 0.0
    """Ranks that have a reason to stop."""

    def add(self, other: Sums) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def add_row(self, row: PackedRow, row_tokens: int) -> None:
        """Count a row; an empty one fills a place too."""
        self.answers += row.num_answers
        self.users += len(row.users)
        self.tokens += row.num_tokens
        self.separate_tokens += row.num_separate_tokens
        self.attended_pairs += count_pairs(row)
        self.places += row_tokens

    def add_scores(self, log_odds: torch.Tensor, labels: torch.Tensor, group: torch.Tensor) -> None:
        """Count what the scores say; CPU tensors of shape (num_answers,)."""
        pairs = (group[:, None] == group[None]) & (labels[:, None] > 0) & (labels[None] <= 0)
        above = (log_odds[:, None] > log_odds[None]).double() + 0.5 * (log_odds[:, None] == log_odds[None])
        self.scored += len(labels)
        self.yes += float((log_odds > 0).sum())
        self.right_pairs += float(above[pairs].sum())
        self.pairs += float(pairs.sum())


def count_pairs(row: PackedRow) -> int:
    """Query-key pairs of the shared-prefix attention over a row."""
    head = row.head_length
    total = head * (head + 1) // 2
    for prefix, suffixes in zip(row.prefix_lengths, row.suffix_lengths, strict=True):
        own = prefix - head
        total += own * head + own * (own + 1) // 2
        total += sum(prefix * suffix + suffix * (suffix + 1) // 2 for suffix in suffixes)
    return total


def scalars(sums: Sums, seconds: float, flops: float, peak_flops: float) -> dict[str, float]:
    """Scalars of some steps under their TensorBoard names.

    Args:
        sums: over all ranks.
        seconds: that the steps took.
        flops: floating point operations of the steps, over all ranks.
        peak_flops: of all devices together, per second; 0: unknown.
    """
    values = {
        "train/tokens_per_second": sums.tokens / seconds,
        "train/users_per_second": sums.users / seconds,
        "train/flops_per_second": flops / seconds,
        "train/row_fill": sums.tokens / max(sums.places, 1.0),
        "train/sharing_gain": sums.separate_tokens / max(sums.tokens, 1.0),
        "train/data_wait_share": sums.wait_seconds / max(sums.num_ranks, 1.0) / seconds,
    }
    if sums.weight:
        values["train/loss"] = sums.loss / sums.weight
    if sums.scored:
        values["train/yes_rate"] = sums.yes / sums.scored
    if sums.pairs:
        values["train/auc"] = sums.right_pairs / sums.pairs
    if peak_flops:
        values["train/mfu"] = flops / seconds / peak_flops
    return values
