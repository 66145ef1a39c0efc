"""The summarizer's engine on a GPU: the texts of one-by-one generation in float32, and none lost in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.summarize import LARGE, answers_of, engine_of, generate, make_model, make_tokenizer, ragged

CUDA = torch.device("cuda")


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
