"""A packed row on its device, ready for a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from trsr_dist.model.attention.layout import Layout, send
from trsr_dist.rows import PackedRow


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
        return Layout.of(self.row, self.device, self.suffixes_only)

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
