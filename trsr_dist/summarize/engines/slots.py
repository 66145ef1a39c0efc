"""A key/value cache whose rows come and go while others are decoding (needs PyTorch and transformers).

Row i holds its tokens at columns 0..length-1: no left padding, so a row never depends on its neighbours' lengths.
Buffers are allocated once and written in place; the stock cache copies itself at each token.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

GROWTH = 256
"""Columns added at a time."""


class Slots(Cache):
    """Keys and values of up to ``num_slots`` sequences; the active ones are the first ``len(lengths)`` rows.

    Args:
        num_layers: layers of the model.
        num_slots: rows.
        device: of the lengths.
    """

    def __init__(self, num_layers: int, num_slots: int, device: torch.device) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.num_slots = num_slots
        self.device = device
        self.lengths: list[int] = []
        self.columns = 0
        """Columns allocated."""
        self.positions = torch.empty(0, dtype=torch.long, device=device)
        """Column that each active row writes next, int64 [active]."""
        self.rows = self.positions
        """0, 1, .. int64 [active]; not rebuilt in every layer."""

    def admit(self, prefilled: DynamicCache, lengths: list[int], room: int) -> None:
        """Copy the rows of a prefilled, right-padded batch behind the active ones.

        Args:
            prefilled: keys and values [batch, heads, padded length, head size] of each layer.
            lengths: true lengths.
            room: columns that the longest of these rows will need in all.
        """
        self.columns = max(self.columns, -(-room // GROWTH) * GROWTH)
        first = len(self.lengths)
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.reserve(source.keys, source.values, self.num_slots, self.columns)
            layer.keys[first : first + len(lengths), :, : source.keys.shape[2]] = source.keys
            layer.values[first : first + len(lengths), :, : source.values.shape[2]] = source.values
        self.lengths += lengths
        self._set_positions()

    def drop(self, row: int) -> None:
        """Free a row: the last active one moves into its place."""
        last = len(self.lengths) - 1
        length = self.lengths[last]
        if row != last:
            for layer in self.layers:
                layer.keys[row, :, :length] = layer.keys[last, :, :length]
                layer.values[row, :, :length] = layer.values[last, :, :length]
        self.lengths[row] = length
        self.lengths.pop()
        self._set_positions()

    def wipe(self, row: int) -> None:
        """Forget a row's numbers that are not finite: a later sequence there masks them, but 0 times NaN is NaN."""
        for layer in self.layers:
            layer.keys[row], layer.values[row] = 0, 0

    def clear(self) -> None:
        """Give the memory back now: layers and cache refer to each other, and a garbage collection may be far."""
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.lengths, self.columns = [], 0

    def advance(self) -> None:
        """Each active row has written one token."""
        self.lengths = [length + 1 for length in self.lengths]
        self.positions += 1

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask of the next token, [active, 1, 1, longest + 1]: it sees its own row's tokens and itself."""
        seen = torch.arange(max(self.lengths) + 1, device=self.device) <= self.positions[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[:, None, None, :]

    def _set_positions(self) -> None:
        self.positions = torch.tensor(self.lengths, dtype=torch.long, device=self.device)
        self.rows = torch.arange(len(self.lengths), device=self.device)


class SlotLayer(CacheLayerMixin):
    """One layer's buffers, [slots, heads, columns, head size]."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    def reserve(self, keys: torch.Tensor, values: torch.Tensor, num_slots: int, columns: int) -> None:
        """Allocate, or widen to more columns."""
        self.keys = _widened(self.keys, keys, num_slots, columns)
        self.values = _widened(self.values, values, num_slots, columns)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token a row, hand out the active rows up to the longest."""
        rows, positions = self._slots.rows, self._slots.positions
        self.keys[rows, :, positions] = key_states[:, :, 0]
        self.values[rows, :, positions] = value_states[:, :, 0]
        longest = self.get_seq_length() + 1
        return self.keys[: len(positions), :, :longest], self.values[: len(positions), :, :longest]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.reserve(key_states, value_states, self._slots.num_slots, self._slots.columns)

    def get_seq_length(self) -> int:
        return max(self._slots.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _widened(old: torch.Tensor | None, like: torch.Tensor, num_slots: int, columns: int) -> torch.Tensor:
    if old is not None and old.shape[2] >= columns:
        return old
    new = like.new_zeros(num_slots, like.shape[1], columns, like.shape[3])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new
