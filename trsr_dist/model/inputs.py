"""A packed row on its device, ready for a forward pass; and the targets of its full text.

The paper's code trains on all tokens of each prompt and its answer. In a packed row a shared position stands for many
sequences: its loss counts as often as it would separately, and a part's last token has one next token per child.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from trsr_dist.model.attention.layout import Layout, send
from trsr_dist.rows import PackedRow

HEAD_ROWS = 1024
"""Positions that the output head takes at once, about: the logits of more are never in memory."""


@dataclass(frozen=True)
class RowInputs:
    """Tensors of a row with at least one user. Lengths stay Python numbers, so that no kernel waits for the GPU."""

    row: PackedRow
    device: torch.device
    suffixes_only: bool = False
    """The prefixes' keys and values are kept; tokens are those of the suffixes."""

    @cached_property
    def token_ids(self) -> torch.Tensor:
        """int64, shape (1, num_tokens)."""
        return self.to_device(self.row.token_ids[self._start :])[None]

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """int64, shape (1, num_tokens)."""
        return self.to_device(self.row.position_ids[self._start :])[None]

    @cached_property
    def labels(self) -> torch.Tensor:
        """int64, shape (num_answers,)."""
        return self.to_device(self.row.labels)

    @cached_property
    def group(self) -> torch.Tensor:
        """int64, shape (num_answers,): the user of each answer."""
        return self.to_device(self.row.group)

    @cached_property
    def teacher(self) -> torch.Tensor:
        """float32, shape (num_answers,): a teacher's log-odds."""
        return self.to_device(self.row.teacher)

    @cached_property
    def layout(self) -> Layout:
        layout = Layout.of(self.row, self.device, self.suffixes_only)
        # Compiled layers read these, and cannot make them.
        _ = layout.code, layout.answer_index
        return layout

    @property
    def _start(self) -> int:
        return self.row.suffix_start if self.suffixes_only else 0

    @cached_property
    def separate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Every prompt as a separate sequence, padded on the right: token ids and mask, (num_answers, longest)."""
        prompts = separate_prompts(self.row)
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros((len(prompts), longest), dtype=np.int64)
        for number, prompt in enumerate(prompts):
            ids[number, : len(prompt)] = prompt
            mask[number, : len(prompt)] = 1
        return self.to_device(ids), self.to_device(mask)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return send(torch.from_numpy(array), self.device)


def separate_prompts(row: PackedRow) -> list[np.ndarray]:
    """Token ids of every prompt of a row, in the order of its answers."""
    suffix, prompts = row.suffix_start, []
    for prefix, lengths in zip(row.prefixes(), row.suffix_lengths, strict=True):
        for size in lengths:
            prompts.append(np.concatenate([prefix, row.token_ids[suffix : suffix + size]]))
            suffix += size
    return prompts


@dataclass(frozen=True, slots=True)
class TextTargets:
    """What the logits at ``source`` should say, each with its weight."""

    source: torch.Tensor
    """int64, shape (num_targets,): positions in the row; some stand several times."""
    target: torch.Tensor
    """int64, shape (num_targets,): token ids."""
    weight: torch.Tensor
    """float32, shape (num_targets,): sums to the number of answers, since each prompt's tokens weigh 1 in all."""

    num_pieces: int
    """Calls of the output head, the same for every row of a run: under ZeRO-3 each gathers weights with all ranks."""

    def pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Source, target and weight of each piece; none is empty."""
        split = (part.tensor_split(self.num_pieces) for part in (self.source, self.target, self.weight))
        return zip(*split, strict=True)


def text_targets(row: PackedRow, answer_ids: tuple[int, int], device: torch.device, row_tokens: int) -> TextTargets:
    """Targets of a row; the loss of a prompt is the mean over its tokens but the first, the answer included.

    Args:
        row: with at least one user.
        answer_ids: tokens of yes and no.
        device: of the result.
        row_tokens: what a row of this run can hold; a short one is filled up with targets of weight 0.
    """
    num_pieces = -(-row_tokens // HEAD_ROWS)
    weights = _position_weights(row)
    parents, answers = _parents(row), row.answer_index
    has_parent = parents >= 0
    # A token is the target of its parent, as often as the sequences through it; each last token's target is the answer.
    arrays = (
        np.concatenate([parents[has_parent], answers]),
        np.concatenate([row.token_ids[has_parent], np.where(row.labels > 0, *answer_ids)]),
        np.concatenate([weights[has_parent], weights[answers]]),
    )
    filled = (np.pad(array, (0, max(0, num_pieces - len(array)))) for array in arrays)
    source, target, weight = map(torch.from_numpy, filled)
    return TextTargets(send(source, device), send(target, device), send(weight.float(), device), num_pieces)


def _position_weights(row: PackedRow) -> np.ndarray:
    """float64, shape (num_tokens,): sum over the sequences through a token of 1 / their number of targets."""
    shares = [
        np.array([1.0 / (prefix + suffix) for suffix in suffixes])
        for prefix, suffixes in zip(row.prefix_lengths, row.suffix_lengths, strict=True)
    ]
    of_users = np.array([share.sum() for share in shares])
    own = [length - row.head_length for length in row.prefix_lengths]
    suffixes = [length for lengths in row.suffix_lengths for length in lengths]
    return np.repeat(
        np.concatenate([[of_users.sum()], of_users, *shares]), np.concatenate([[row.head_length], own, suffixes])
    )


def _parents(row: PackedRow) -> np.ndarray:
    """int64, shape (num_tokens,): the position before each token in its sequences; -1 at a sequence's start."""
    parents = np.arange(row.num_tokens) - 1
    start, suffix, head = row.head_length, row.suffix_start, row.head_length
    for length, lengths in zip(row.prefix_lengths, row.suffix_lengths, strict=True):
        parents[start] = head - 1
        start += length - head
        for size in lengths:
            parents[suffix] = start - 1
            suffix += size
    return parents
