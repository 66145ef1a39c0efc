"""The calls of the flash back ends with a kernel in plain mathematics: both ways of reading the head are exact."""

from __future__ import annotations

import pytest
import torch

from trsr_dist.model.attention.backends import cascade
from trsr_dist.model.attention.dense import dense_attention
from trsr_dist.model.attention.layout import Call, Layout

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


def test_a_copied_head_is_no_call_of_its_own() -> None:
    """The prefixes' queries are attended once, those of the suffixes twice."""
    layout = Layout(5, *LAYOUTS["several"], torch.device("cpu"))
    copied, separate = ExactKernel(), ExactKernel()
    attend(cascade(copied, copies_head=True), layout, False)
    attend(cascade(separate, copies_head=False), layout, False)
    num_suffix_tokens = sum(layout.suffix_totals)
    assert copied.num_queries == layout.num_tokens + num_suffix_tokens
    assert separate.num_queries == copied.num_queries + layout.num_tokens - layout.head
