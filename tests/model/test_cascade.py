"""The calls of the flash back ends with a kernel in plain mathematics: both ways of reading the head are exact."""

from __future__ import annotations

import pytest
import torch

from trsr_dist.model.attention.backends import cascade, dense_attention
from trsr_dist.model.attention.layout import Call, Layout
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import pack_row

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALE = HEAD_DIM**-0.5
LAYOUTS = {
    "one user": ((30,), ((4, 1, 9),)),
    "several": ((30, 1, 17, 50), ((4, 1, 9), (3,), (2, 2), (7,) * 12)),
}


class ExactKernel:
    """Segment by segment; causal ones aligned at their ends, as FlashAttention 2 does it from version 2.1 on."""

    def __init__(self) -> None:
        self.num_queries = 0

    def forward(self, q, k, v, call: Call, scale: float):  # noqa: ANN001, ANN201
        self.num_queries += len(q)
        scores = self._scores(q, k, call, scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        return torch.einsum("hqk,khd->qhd", weights, self._wide(v)), lse

    def backward(self, grad, tensors, call: Call, scale: float):  # noqa: ANN001, ANN201
        q, k, v, out, lse = tensors
        weights = (self._scores(q, k, call, scale) - lse[..., None]).exp()
        rows = (grad * out).sum(-1).t()[..., None]
        scores = weights * (torch.einsum("qhd,khd->hqk", grad, self._wide(v)) - rows) * scale
        dk = torch.einsum("hqk,qhd->khd", scores, q).unflatten(1, (KV_HEADS, -1)).sum(2)
        dv = torch.einsum("hqk,qhd->khd", weights, grad).unflatten(1, (KV_HEADS, -1)).sum(2)
        return torch.einsum("hqk,khd->qhd", scores, self._wide(k)), dk, dv

    def _scores(self, q, k, call: Call, scale: float) -> torch.Tensor:  # noqa: ANN001
        allowed = torch.zeros(len(q), len(k), dtype=torch.bool)
        row, column = 0, 0
        for queries, keys in zip(call.query_lengths, call.key_lengths, strict=True):
            block = torch.ones(queries, keys, dtype=torch.bool)
            block = block.tril(keys - queries) if call.causal else block
            allowed[row : row + queries, column : column + keys] = block
            row, column = row + queries, column + keys
        assert (row, column) == (len(q), len(k))
        scores = torch.einsum("qhd,khd->hqk", q, self._wide(k)) * scale
        return scores.masked_fill(~allowed, float("-inf"))

    @staticmethod
    def _wide(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(HEADS // KV_HEADS, dim=1)


def attend(function, layout: Layout, answers_only: bool) -> tuple[torch.Tensor, ...]:  # noqa: ANN001
    generator = torch.Generator().manual_seed(0)
    count = layout.num_answers if answers_only else layout.num_tokens
    sizes = ((count, HEADS), (layout.num_tokens, KV_HEADS), (layout.num_tokens, KV_HEADS), (count, HEADS))
    q, k, v, grad = (torch.randn(*size, HEAD_DIM, generator=generator, dtype=torch.float64) for size in sizes)
    operands = [x.requires_grad_() for x in (q, k, v)]
    out = function(*operands, layout, answers_only, SCALE)
    return out.detach(), *torch.autograd.grad(out, operands, grad)


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("copies_head", [False, True])
@pytest.mark.parametrize("head", [0, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_output_and_gradients_are_exact(name: str, head: int, copies_head: bool, answers_only: bool) -> None:
    layout = Layout(head, *LAYOUTS[name], torch.device("cpu"))
    expected = attend(dense_attention, layout, answers_only)
    found = attend(cascade(ExactKernel(), copies_head), layout, answers_only)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=1e-6)  # outputs are merged in float32


def test_a_copied_head_is_no_separate_call() -> None:
    """The prefixes' queries are attended once, those of the suffixes twice."""
    layout = Layout(5, *LAYOUTS["several"], torch.device("cpu"))
    copied, separate = ExactKernel(), ExactKernel()
    attend(cascade(copied, copies_head=True), layout, False)
    attend(cascade(separate, copies_head=False), layout, False)
    num_suffix_tokens = sum(layout.suffix_totals)
    assert copied.num_queries == layout.num_tokens + num_suffix_tokens
    assert separate.num_queries == copied.num_queries + layout.num_tokens - layout.head


CPU = torch.device("cpu")
SMALL = Layout(2, (3, 1), ((2, 1), (1,)), CPU)
"""``H H P P P Q C C D E``: two users, the first with the candidates C and D."""


def test_a_call_tells_flash_kernels_where_its_segments_begin() -> None:
    call = Call(slice(0, 9), slice(0, 6), (2, 3, 4), (5, 0, 1), True, CPU)
    assert (call.query_starts.tolist(), call.key_starts.tolist()) == ([0, 2, 5, 9], [0, 5, 5, 6])
    assert call.query_starts.dtype == call.key_starts.dtype == torch.int32
    assert (call.longest_query, call.longest_key) == (4, 5)
    assert call.query_starts.device == CPU


def test_a_layouts_sizes_by_hand() -> None:
    assert (SMALL.num_tokens, SMALL.suffix_start, SMALL.num_answers, SMALL.suffix_totals) == (10, 6, 3, (3, 1))
    assert SMALL.answer_index.tolist() == [7, 8, 9] and SMALL.answer_index.dtype == torch.int64
    assert SMALL.segments.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3, 4, 5], [0, 0, 0, 0, 0, 0, 1, 1, 1, 2]]
    assert SMALL.copies.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9]
    own, heads = SMALL.copied_places
    assert own.tolist() == [0, 1, 4, 5, 6, 9, 10, 11, 12, 13] and heads.tolist() == [2, 3, 7, 8]
    assert own.dtype == heads.dtype == SMALL.copies.dtype == SMALL.segments.dtype == torch.int64
    row = pack_row(
        [
            TokenizedUser("a", (1, 2, 3, 4, 5), ((6, 7), (8,)), (1, 0), ("x", "y")),
            TokenizedUser("b", (1, 2, 9), ((8,),), (1,), ("z",)),
        ]
    )
    assert Layout.of(row, CPU) == SMALL


def test_who_reads_whom_by_hand() -> None:
    reads = [
        "0", "01", "012", "0123", "01234", "015",
        "012346", "0123467", "012348", "0159",
    ]  # fmt: skip
    assert [[place for place in range(10) if row[place]] for row in SMALL.mask.tolist()] == [
        [int(place) for place in places] for places in reads
    ]


def test_all_is_on_the_layouts_device() -> None:
    layout = Layout(2, (3, 1), ((2, 1), (1,)), torch.device("meta"))
    made = (layout.mask, layout.segments, layout.copies, *layout.copied_places, layout.answer_index)
    starts = [one for call in layout.calls for one in (call.query_starts, call.key_starts)]
    assert {tensor.device.type for tensor in (*made, *starts)} == {"meta"}


def test_the_calls_by_hand() -> None:
    suffixes, whole = (2, 1, 1), slice(0, 10)
    assert SMALL.calls == (
        Call(whole, whole, (2, 3, 1, *suffixes), (2, 3, 1, *suffixes), True, CPU),
        Call(slice(2, 10), slice(0, 2), (8,), (2,), False, CPU),
        Call(slice(6, 10), slice(2, 6), (3, 1), (3, 1), False, CPU),
    )
    assert SMALL.copied_calls == (
        Call(whole, slice(0, 14), (2, 3, 1, *suffixes), (2, 5, 3, *suffixes), True, CPU),
        Call(slice(6, 10), slice(2, 10), (3, 1), (5, 3), False, CPU),
    )
    answers = slice(0, 3)
    assert SMALL.answer_calls == (
        Call(answers, slice(6, 10), (1, 1, 1), suffixes, False, CPU),
        Call(answers, slice(0, 2), (3,), (2,), False, CPU),
        Call(answers, slice(2, 6), (2, 1), (3, 1), False, CPU),
    )
    alone = Layout(0, (3,), ((2, 1),), CPU)
    assert [len(calls) for calls in (alone.calls, alone.answer_calls, alone.copied_calls)] == [2, 2, 2]
    assert alone.calls[0].query_lengths == (3, 2, 1)
