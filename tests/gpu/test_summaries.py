"""The summarizer's engine on a GPU: the texts of one-by-one generation in float32, and none lost in bfloat16."""

from __future__ import annotations

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
    done = answers_of(engine_of(model, tokenizer, num_slots=4), requests)
    same = [done[request.key].text == generate(model, tokenizer, request) for request in requests]
    assert all(done[request.key].new_tokens == request.max_new_tokens for request in requests)
    assert all(same) if dtype is torch.float32 else any(same)
