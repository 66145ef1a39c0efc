"""Whole models on a GPU: shared prefixes against separate sequences; nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

from tests.model.test_exactness import one_by_one
from tests.model.world import (
    CONFIGS,
    gradients,
    make_model,
    make_row,
    make_user,
    model_config,
    recommender,
    relative,
)
from trsr_dist.model.compilation import compile_layers, warm_up
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.rows import pack_row

CUDA = torch.device("cuda")


def answers(model: Recommender) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = RowInputs(make_row(12), CUDA)
    logits = model(inputs, "logits")
    torch.nn.functional.cross_entropy(logits.float(), torch.where(inputs.labels > 0, 3, 4), reduction="sum").backward()
    return logits.detach().float().cpu(), gradients(model).cpu()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_is_as_near_to_float32_as_separate_sequences_are(
    kind: str, checkpointing: bool | str, compiled: bool
) -> None:
    if compiled and (kind != "llama" or checkpointing == "selective"):
        pytest.skip("one architecture is compiled, and recomputes what is cheap by itself")
    row = make_row(12)
    exact = one_by_one(make_model(model_config(kind)), row)
    separate = one_by_one(make_model(model_config(kind), torch.bfloat16), row)
    model = recommender(make_model(model_config(kind), torch.bfloat16).to(CUDA), "torch", checkpointing)
    if compiled:
        compile_layers(model)
        warm_up(model, answers_only=True)
    shared = answers(model)
    spread = float(exact[0].std())
    assert float((shared[0] - exact[0]).abs().max()) < 2 * float((separate[0] - exact[0]).abs().max()) + 0.02 * spread
    assert relative(shared[1], exact[1]) < 2 * relative(separate[1], exact[1]) + 0.02


def test_separate_sequences_have_finite_gradients_of_any_length() -> None:
    """As models run that cannot share prefixes: padded batches with a mask, of lengths at which cuDNN's attention gave
    NaN."""
    row = pack_row([make_user("a", 690, (14, 9, 3)), make_user("b", 183, (9, 5))])
    exact = one_by_one(make_model(model_config()), row)
    model = recommender(make_model(model_config(), torch.bfloat16).to(CUDA), None)
    inputs = RowInputs(row, CUDA)
    logits = model(inputs, "logits")
    torch.nn.functional.cross_entropy(logits.float(), torch.where(inputs.labels > 0, 3, 4), reduction="sum").backward()
    assert bool(torch.isfinite(gradients(model)).all())
    separate = one_by_one(make_model(model_config(), torch.bfloat16), row)
    assert relative(gradients(model).cpu(), exact[1]) < 2 * relative(separate[1], exact[1]) + 0.02


def test_float32_is_exact_with_the_dense_mask() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = one_by_one(make_model(model_config()), make_row(12))
    found = answers(recommender(make_model(model_config()).to(CUDA), "dense"))
    torch.testing.assert_close(found[0], exact[0], atol=1e-4, rtol=0)
    assert relative(found[1], exact[1]) < 1e-4


def test_no_step_waits_for_the_gpu() -> None:
    model = recommender(make_model(model_config(), torch.bfloat16).to(CUDA), "torch")
    answers(model)  # kernels are chosen and memory is taken in the first pass
    inputs = RowInputs(make_row(12), CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = model(inputs, "logits")
        torch.nn.functional.cross_entropy(logits.float(), inputs.labels, reduction="sum").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
