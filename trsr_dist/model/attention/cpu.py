"""The flash kernel of PyTorch's CPU build, with variable lengths by batching segments of similar length.

The operators are private to PyTorch, so ``is_available`` asks for them; without them the dense mask serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch

from trsr_dist.model.attention.layout import Call

NAME = "_scaled_dot_product_flash_attention_for_cpu"
PADDING = 1.25
"""Segments share a batch while padding them to its longest adds at most this factor."""
LONG_SEGMENT = 128
"""Longer segments stand alone: they fill the cores, and as slices they need no copy."""


def is_available() -> bool:
    """Whether this PyTorch has the operators."""
    return hasattr(torch.ops.aten, NAME) and hasattr(torch.ops.aten, f"{NAME}_backward")


@dataclass(frozen=True)
class Side:
    """Where a batch's queries (or keys) stand."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @cached_property
    def padded(self) -> int:
        return max(self.lengths)

    @cached_property
    def is_uniform(self) -> bool:
        return min(self.lengths) == self.padded

    @cached_property
    def is_slice(self) -> bool:
        """Whether the batch is one stretch of equal segments."""
        return self.is_uniform and all(b - a == self.padded for a, b in zip(self.starts, self.starts[1:], strict=False))

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool, shape (num_segments, padded): False on padding."""
        return torch.arange(self.padded)[None] < torch.tensor(self.lengths)[:, None]

    @cached_property
    def index(self) -> torch.Tensor:
        """int64, shape (num_segments, padded); padding repeats a segment's last token."""
        steps = torch.arange(self.padded)[None].minimum(torch.tensor(self.lengths)[:, None] - 1)
        return torch.tensor(self.starts)[:, None] + steps

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, heads, dim) to (num_segments, heads, padded, dim)."""
        if self.is_slice:
            stretch = x[self.starts[0] : self.starts[0] + len(self.starts) * self.padded]
            return stretch.unflatten(0, (len(self.starts), self.padded)).transpose(1, 2)
        return x[self.index].transpose(1, 2)

    def scatter(self, x: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        """Inverse of ``gather``, into ``out``; padding is left out."""
        values = x.transpose(1, 2)
        if self.is_slice:
            target = out[self.starts[0] : self.starts[0] + len(self.starts) * self.padded]
            values = values.flatten(0, 1)
            target.add_(values) if add else target.copy_(values)
            return
        places, values = self.index[self.valid], values[self.valid]
        if add:
            out.index_add_(0, places, values)
        else:
            out[places] = values


@dataclass(frozen=True, slots=True)
class Batch:
    """Segments that run as one dense call."""

    queries: Side
    keys: Side
    causal: bool

    def key_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive, shape (num_segments, 1, 1, padded keys); None where no key is padding or causality hides it."""
        if self.causal or self.keys.is_uniform:
            return None
        mask = torch.zeros(len(self.keys.lengths), self.keys.padded, dtype=dtype)
        return mask.masked_fill_(~self.keys.valid, float("-inf"))[:, None, None]


class CpuKernel:
    """``cascade.Kernel`` on CPU."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kernel = getattr(torch.ops.aten, NAME)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[0], q.shape[1], 1)
        for batch in batches(call.query_lengths, call.key_lengths, call.causal):
            queries, keys, values = self._operands(batch, q, k, v)
            mask = batch.key_mask(q.dtype)
            part, part_lse = kernel(queries, keys, values, 0.0, batch.causal, attn_mask=mask, scale=scale)
            batch.queries.scatter(self._unfold(batch, part, q.shape[1]), out)
            batch.queries.scatter(self._unfold(batch, part_lse.unsqueeze(-1), q.shape[1]), lse)
        return out, lse.squeeze(-1).t().contiguous()

    def backward(
        self, grad: torch.Tensor, tensors: tuple[torch.Tensor, ...], call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kernel = getattr(torch.ops.aten, f"{NAME}_backward")
        dtype = grad.dtype
        # In bfloat16 the backward pass of many short segments takes five times as long as in float32.
        grad, q, k, v, out, lse = (x.float() for x in (grad, *tensors))
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        lse = lse.t().unsqueeze(-1)
        for batch in batches(call.query_lengths, call.key_lengths, call.causal):
            queries, keys, values = self._operands(batch, q, k, v)
            fold = [self._fold(batch, batch.queries.gather(x), k.shape[1]) for x in (grad, out, lse)]
            upstream = self._without_padding(batch, fold[0])
            # The kernel reads the log-sum-exp with the strides that its forward pass writes.
            log_sums = fold[2].squeeze(-1).transpose(1, 2).contiguous().transpose(1, 2)
            mask = batch.key_mask(q.dtype)
            parts = kernel(
                upstream.contiguous(),
                queries,
                keys,
                values,
                fold[1].contiguous(),
                log_sums,
                0.0,
                batch.causal,
                attn_mask=mask,
                scale=scale,
            )
            batch.queries.scatter(self._unfold(batch, parts[0], q.shape[1]), dq, add=True)
            for part, total in zip(parts[1:], (dk, dv), strict=True):
                batch.keys.scatter(_merge_heads(part, k.shape[1]), total, add=True)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)

    def _operands(self, batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keys, values = batch.keys.gather(k), batch.keys.gather(v)
        if batch.causal:
            group = q.shape[1] // k.shape[1]
            keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (keys, values))
        return self._fold(batch, batch.queries.gather(q), k.shape[1]), keys, values

    @staticmethod
    def _fold(batch: Batch, x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """Without causality, the query heads of one key head are more queries: keys need not be repeated."""
        if batch.causal or x.shape[1] == num_kv_heads:
            return x
        return x.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)

    @staticmethod
    def _unfold(batch: Batch, x: torch.Tensor, num_heads: int) -> torch.Tensor:
        if x.shape[1] == num_heads:
            return x
        return x.unflatten(2, (num_heads // x.shape[1], batch.queries.padded)).flatten(1, 2)

    @staticmethod
    def _without_padding(batch: Batch, grad: torch.Tensor) -> torch.Tensor:
        if batch.queries.is_uniform:
            return grad
        valid = batch.queries.valid.to(grad.dtype)
        repeats = grad.shape[2] // batch.queries.padded
        return grad * valid.repeat(1, repeats)[:, None, :, None]


@lru_cache(maxsize=1024)
def batches(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], causal: bool) -> tuple[Batch, ...]:
    """Cut a call's segments into batches: long ones alone, short ones by length."""
    query_starts = list(accumulate(query_lengths, initial=0))
    key_starts = list(accumulate(key_lengths, initial=0))
    found = []
    for group in _groups(query_lengths, key_lengths, causal):
        queries = Side(tuple(query_starts[i] for i in group), tuple(query_lengths[i] for i in group))
        keys = Side(tuple(key_starts[i] for i in group), tuple(key_lengths[i] for i in group))
        found.append(Batch(queries, keys, causal))
    return tuple(found)


def _groups(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], causal: bool) -> Iterator[list[int]]:
    order = sorted(range(len(key_lengths)), key=lambda i: (-query_lengths[i], -key_lengths[i], i))
    group: list[int] = []
    for segment in order:
        if group and not _may_join(query_lengths, key_lengths, causal, group[0], segment):
            yield sorted(group)
            group = []
        group.append(segment)
    yield sorted(group)


def _may_join(
    query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], causal: bool, first: int, segment: int
) -> bool:
    """Whether a segment may stand in the batch of another. Only causality hides padded queries from the results."""
    if not causal and query_lengths[first] != query_lengths[segment]:
        return False
    longest, shorter = key_lengths[first], key_lengths[segment]
    return longest <= max(LONG_SEGMENT, shorter) and longest <= PADDING * shorter + 4


def _merge_heads(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Sum the gradients of repeated heads."""
    return x if x.shape[1] == num_kv_heads else x.unflatten(1, (num_kv_heads, -1)).sum(2)
