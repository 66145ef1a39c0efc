"""The summarizer's engine on a GPU: the texts of one-by-one generation in float32, and none lost in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.summarize import LARGE, answers_of, engine_of, generate, make_model, make_tokenizer, ragged
from trsr_dist.summarize.engines.slots import Slots
from trsr_dist.summarize.engines.steps import attend_by_length

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("key_heads", [8, 2])
def test_attention_by_length_is_that_with_a_mask(key_heads: int) -> None:
    torch.manual_seed(0)
    slots = Slots(1, 6, CUDA)
    slots.columns, slots.lengths = 512, [3, 511, 200, 64]
    (layer,) = slots.layers
    one = torch.randn(6, key_heads, 1, 64, device=CUDA, dtype=torch.bfloat16)
    layer.reserve(one, one, 6, 512)
    layer.keys.normal_()
    layer.values.normal_()
    slots.begin([1, 2, 3, 4], is_exact=False, reads_all=False)
    assert slots.extent == (6, 512)
    query = torch.randn(6, 8, 1, 64, device=CUDA, dtype=torch.bfloat16)
    keys, values = layer.update(one, one)
    found, _ = attend_by_length(nn.Identity(), query, keys, values, slots.spans())
    keys, values = (x.float().repeat_interleave(8 // key_heads, dim=1) for x in (keys, values))
    expected = scaled_dot_product_attention(query.float(), keys, values, attn_mask=slots.mask(torch.float32))
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_those_of_generate(dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, LARGE).to(CUDA, dtype)
    requests = ragged(tokenizer, 12)
    engine = engine_of(model, tokenizer, num_slots=4)
    done = answers_of(engine, requests)
    same = [done[request.key].text == generate(model, tokenizer, request) for request in requests]
    assert all(done[request.key].new_tokens == request.max_new_tokens for request in requests)
    assert all(same) if dtype is torch.float32 else any(same)
    assert engine._slots.graphs and engine._steps.reads_all == (dtype is torch.float32), "the log has the reason"


def test_captured_steps_make_the_texts_of_uncaptured_ones() -> None:
    """The shortest prompts first, so that the room grows and graphs are captured again; rows move all the time."""
    torch.backends.cuda.matmul.allow_tf32 = False
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, LARGE).to(CUDA)
    requests = sorted(ragged(tokenizer, 60), key=lambda request: len(request.prompt.text()))
    requests[::4] = [replace(request, temperature=0.8, seed=3) for request in requests[::4]]
    captured, plain = (engine_of(model, tokenizer, 20, captures) for captures in (True, False))
    texts = answers_of(captured, requests)
    assert captured._steps._capture is not None, "the log has the reason"
    extents = [*captured._slots.graphs]
    assert {extent.rows for extent in extents} == {8, 16, 20} and max(extent.columns for extent in extents) >= 768
    assert texts == answers_of(plain, requests)
    assert not plain._slots.graphs
