"""A key/value cache whose rows come and go while others are decoding (needs PyTorch and transformers).

Row i holds its tokens at columns 0..length-1: no left padding, so a row never depends on its neighbours' lengths.
Buffers are allocated once and written in place; the stock cache copies itself at each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

GROWTH = 256
"""Columns added at a time."""
LEAST_ROWS = 8
STEPS_OF_LENGTH = 8
"""Rounded extents: rows are a power of two, from the first on; columns a multiple of ``GROWTH``, or of this part of
the next power of two. So there are few: 8 up to 2048 columns, 4 for each doubling beyond, times 5 for 128 rows."""


class Extent(NamedTuple):
    """Rows and columns that a step reads."""

    rows: int
    columns: int


class Slots(Cache):
    """Keys and values of up to ``num_slots`` sequences; the active ones are the first ``len(lengths)`` rows.

    Args:
        num_layers: layers of the model.
        num_slots: rows.
        device: of the inputs.
    """

    def __init__(self, num_layers: int, num_slots: int, device: torch.device) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.num_slots = num_slots
        self.device = device
        self.lengths: list[int] = []
        self.columns = 0
        """Columns allocated."""
        self.extent = Extent(0, 0)
        """Of the step that was begun last."""
        self.graphs: dict[Extent, Callable[[], None]] = {}
        """Steps that were captured. They hold the addresses of these buffers, and go with them."""
        self.outputs: tuple[torch.Tensor, ...] = ()
        """Where the captured steps leave what they make, [slots, ...] each."""
        self._inputs = torch.zeros(num_slots, 2, dtype=torch.long, device=device)
        self._rows = torch.arange(num_slots, device=device)

    def admit(self, prefilled: DynamicCache, lengths: list[int], room: int) -> None:
        """Copy the rows of a prefilled, right-padded batch behind the active ones.

        Args:
            prefilled: keys and values [batch, heads, padded length, head size] of each layer.
            lengths: true lengths.
            room: columns that the longest of these rows will need in all.
        """
        if room > self.columns:
            self.graphs = {}
            self.columns = _multiple(room, GROWTH)
        first = len(self.lengths)
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.reserve(source.keys, source.values, self.num_slots, self.columns)
            layer.keys[first : first + len(lengths), :, : source.keys.shape[2]] = source.keys
            layer.values[first : first + len(lengths), :, : source.values.shape[2]] = source.values
        self.lengths += lengths

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

    def wipe(self, row: int) -> None:
        """Forget a row's numbers that are not finite: a later sequence there masks them, but 0 times NaN is NaN."""
        for layer in self.layers:
            layer.keys[row], layer.values[row] = 0, 0

    def clear(self) -> None:
        """Give the memory back now: layers and cache refer to each other, and a garbage collection may be far."""
        self.graphs, self.outputs = {}, ()
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.lengths, self.columns = [], 0

    def begin(self, tokens: list[int], is_exact: bool, reads_all: bool = True) -> None:
        """Hand in each active row's next token. Rows beyond them, where the extent is rounded, run along in their first
        column, which whatever is admitted there writes again.

        Args:
            tokens: one for each active row.
            is_exact: read no row and no column more than needed, else a rounded extent.
            reads_all: all columns of an extent are read; it has all that there are otherwise.
        """
        needed = Extent(len(tokens), max(self.lengths) + 1 if is_exact or reads_all else self.columns)
        self.extent = needed if is_exact else self._rounded(needed)
        pairs = [*zip(tokens, self.lengths, strict=True)] + [(0, 0)] * (self.extent.rows - needed.rows)
        # From pinned memory the copy does not wait for the GPU.
        given = torch.tensor(pairs, pin_memory=self.device.type == "cuda")
        self._inputs[: self.extent.rows].copy_(given, non_blocking=True)
        self.rows, self.positions = self._rows[: self.extent.rows], self._inputs[: self.extent.rows, 1]

    def inputs(self) -> dict[str, torch.Tensor]:
        """Tokens and positions, [rows, 1]."""
        ids, positions = self._inputs[: self.extent.rows].split(1, dim=1)
        return {"input_ids": ids, "position_ids": positions}

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask, [rows, 1, 1, columns]: a token sees its own row's tokens and itself."""
        seen = torch.arange(self.extent.columns, device=self.device) <= self.positions[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[:, None, None, :]

    def spans(self) -> torch.Tensor:
        """In place of a mask: where each row's query begins, where its keys begin in units of a token, and how many of
        them its token sees, int32 [3, 1, 1, rows + 1].

        Raises:
            RuntimeError: that depends on the layer.
        """
        distances = {layer.keys.stride(0) // layer.keys.stride(2) for layer in self.layers}
        if len(distances) > 1:
            raise RuntimeError("the model's layers differ in their number of heads")
        rows = torch.arange(self.extent.rows + 1, dtype=torch.int32, device=self.device)
        seen = torch.zeros_like(rows)
        seen[:-1] = self.positions + 1
        return torch.stack([rows, rows * distances.pop(), seen])[:, None, None]

    def advance(self) -> None:
        """Each active row has written one token."""
        self.lengths = [length + 1 for length in self.lengths]

    def _rounded(self, needed: Extent) -> Extent:
        rows = max(LEAST_ROWS, _power_of_two(needed.rows))
        columns = _multiple(needed.columns, max(GROWTH, _power_of_two(needed.columns) // STEPS_OF_LENGTH))
        return Extent(min(rows, self.num_slots), min(columns, self.columns))


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
        """Write one token a row, hand out what the step reads."""
        slots = self._slots
        self.keys[slots.rows, :, slots.positions] = key_states[:, :, 0]
        self.values[slots.rows, :, slots.positions] = value_states[:, :, 0]
        rows, columns = slots.extent
        return self.keys[:rows, :, :columns], self.values[:rows, :, :columns]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.reserve(key_states, value_states, self._slots.num_slots, self._slots.columns)

    def get_seq_length(self) -> int:
        return self._slots.extent.columns - 1

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


def _multiple(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
