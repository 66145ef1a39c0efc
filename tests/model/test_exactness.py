"""Sharing prefixes changes nothing: logits and LoRA gradients equal those of separate, unpadded sequences."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from tests.model.world import (
    ANSWERS,
    CONFIGS,
    CPU,
    ROPES,
    Counted,
    gradients,
    make_model,
    make_row,
    make_user,
    model_config,
    recommender,
    relative,
    run,
)
from trsr_dist.model.adapters import add_lora
from trsr_dist.model.attention import backends
from trsr_dist.model.attention.cpu import CpuKernel
from trsr_dist.model.attention.layout import Layout, decoded
from trsr_dist.model.inputs import RowInputs, separate_prompts, text_targets
from trsr_dist.rows import PackedRow, pack_row

BACKENDS = ["cpu", "dense"]
HEADS = [0, 12]


def one_by_one(
    model: nn.Module, row: PackedRow, answers: tuple[int, int] = ANSWERS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: every prompt alone through the stock model, nothing of this project in it."""
    model.zero_grad()
    logits = []
    for prompt, label in zip(separate_prompts(row), row.labels, strict=True):
        output = model(input_ids=torch.tensor(prompt)[None]).logits[:, -1]
        target = torch.tensor([answers[0] if label else answers[1]])
        nn.functional.cross_entropy(output.float(), target, reduction="sum").backward()
        logits.append(output.detach().float())
    return torch.cat(logits), gradients(model)


def assert_equal(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert relative(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_separate_sequences(kind: str, backend: str, head: int) -> None:
    model, row = make_model(model_config(kind)), make_row(head)
    assert row.head_length == head
    assert_equal(run(recommender(model, backend), row), one_by_one(model, row))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_with_recomputed_activations(backend: str) -> None:
    model, row = make_model(model_config()), make_row(12)
    whole = run(recommender(model, backend), row)
    recomputed = run(recommender(model, backend, checkpointing=True), row)
    assert torch.equal(whole[0], recomputed[0])
    assert_equal(recomputed, one_by_one(model, row))


def test_recomputation_is_really_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = CpuKernel.forward
    monkeypatch.setattr(CpuKernel, "forward", lambda *args: (calls.append(1), original(*args))[1])
    model, row = make_model(model_config()), make_row()
    run(recommender(model, "cpu"), row)
    without = len(calls)
    run(recommender(model, "cpu", checkpointing=True), row)
    # Older versions of transformers recompute a layer's whole call, the last one's at the answers too.
    last_is_too = type(model.model.layers[-1]).__call__ is not torch.nn.Module.__call__
    assert (without, len(calls) - without) == (6, 10 + 2 * last_is_too), "the two layers below the last one run twice"


@pytest.mark.parametrize("kind", CONFIGS)
def test_selective_recomputation_runs_no_large_product_twice(kind: str) -> None:
    """Attention and the products of the base's matrices run once; the adapters', which are narrow, run again."""
    model, row = make_model(model_config(kind)), make_row(12)
    counts = {mode: Counted() for mode in (False, True, "selective")}
    for mode, count in counts.items():
        reader = recommender(model, "cpu", mode)
        with count:
            found = run(reader, row)
        assert_equal(found, one_by_one(model, row))
    whole, every, selective = (counts[mode] for mode in (False, True, "selective"))
    assert selective.attention == whole.attention < every.attention
    assert selective.products == whole.products <= every.products - 2 * 6, "q, k, v, o, gate and up of two layers"


def test_selective_recomputation_of_an_architecture_without_shared_prefixes() -> None:
    """GPT-2's config has no intermediate_size, and its weights lie the other way round."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
    base = AutoModelForCausalLM.from_config(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    layers = add_lora(base, 0, r=4, alpha=8, dropout=0.0, target_modules=["c_attn"], use_rslora=False, init="kaiming")
    assert layers
    row = make_row(12)
    whole, selective = run(recommender(base, None), row), run(recommender(base, None, "selective"), row)
    assert torch.equal(whole[0], selective[0]) and float(whole[1].norm()) > 0
    assert relative(selective[1], whole[1]) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_is_computed_below_the_first_adapter(checkpointing: bool) -> None:
    model = recommender(make_model(model_config()), "cpu", checkpointing)
    seen = []
    model.causal.model.embed_tokens.register_forward_hook(lambda *args: seen.append(args[-1].requires_grad))
    run(model, make_row())
    assert seen == [False]


@pytest.mark.parametrize("rope", ROPES)
def test_equal_with_scaled_rotary_positions(rope: str) -> None:
    model, row = make_model(model_config(rope=rope, max_position_embeddings=256)), make_row(12)
    assert_equal(run(recommender(model, "cpu"), row), one_by_one(model, row))


@pytest.mark.parametrize("settings", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 32}])
def test_equal_with_other_heads(settings: dict) -> None:
    model, row = make_model(model_config(**settings)), make_row(12)
    assert_equal(run(recommender(model, "cpu"), row), one_by_one(model, row))


def test_equal_with_all_linear_layers_adapted() -> None:
    model, row = make_model(model_config(), targets="all"), make_row(12)
    assert_equal(run(recommender(model, "cpu"), row), one_by_one(model, row))


def test_pair_is_the_two_logits_in_float32() -> None:
    model, row = make_model(model_config()), make_row(12)
    logits, _ = run(recommender(model, "cpu"), row)
    pair, _ = run(recommender(model, "cpu"), row, "pair")
    torch.testing.assert_close(pair, logits[:, list(ANSWERS)], atol=1e-5, rtol=0)


def test_rows_do_not_depend_on_their_other_users() -> None:
    model = make_model(model_config())
    users = [make_user("a", 60, (5, 6), 8), make_user("b", 33, (4,), 8)]
    together, _ = run(recommender(model, "cpu"), pack_row(users))
    alone = torch.cat([run(recommender(model, "cpu"), pack_row([user]))[0] for user in users])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_text_loss_equals_separate_sequences(backend: str) -> None:
    model, row = make_model(model_config()), make_row(12)
    model.zero_grad()
    expected = 0.0
    for prompt, label in zip(separate_prompts(row), row.labels, strict=True):
        text = torch.tensor([*prompt, ANSWERS[0] if label else ANSWERS[1]])
        logits = model(input_ids=text[None, :-1]).logits[0]
        loss = nn.functional.cross_entropy(logits.float(), text[1:])
        loss.backward()
        expected += loss.item()
    shared = recommender(model, backend)
    loss = shared(RowInputs(row, CPU), "text", text_targets(row, ANSWERS, CPU, row.num_tokens))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert relative(gradients(shared), gradients(model)) < 1e-5


def test_separate_fallback_equals_the_oracle() -> None:
    model, row = make_model(model_config()), make_row(12)
    assert_equal(run(recommender(model, None), row), one_by_one(model, row))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [1.0 + n for n in range(8)]},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_separate_prompts_of_other_lengths_leave_the_rotary_scaling_alone(scaling: dict) -> None:
    rope = scaling | {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
    model, row = make_model(model_config(rope_parameters=rope, max_position_embeddings=64)), make_row()
    with torch.no_grad():
        found = recommender(model, None)(RowInputs(row, CPU), "logits")
        prompts = [torch.tensor(prompt)[None] for prompt in separate_prompts(row)]
        alone = [copy.deepcopy(model)(input_ids=prompt).logits[0, -1] for prompt in prompts]
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_separate_prompts_in_bfloat16_have_no_rounded_scores(cap: float | None) -> None:
    """Logits of 16 and more in bfloat16 are multiples of 1/8: most candidates of a user would be tied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = Gemma2Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, final_logit_softcapping=cap
    )
    base = AutoModelForCausalLM.from_config(config)
    base.lm_head.weight = nn.Parameter(torch.randn(300, 64) * 4)
    row = make_row()
    with torch.no_grad():
        exact = recommender(base, None)(RowInputs(row, CPU), "pair")
        rounded = recommender(base.bfloat16(), None)
        for found in (rounded(RowInputs(row, CPU), "pair"), rounded(RowInputs(row, CPU), "logits")[:, list(ANSWERS)]):
            assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
            assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())
    assert cap is None or float(exact.abs().max()) < cap


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head_in_bfloat16_has_no_rounded_scores(settings: dict) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(model_config())
    base.lm_head.weight.data *= 100
    model = get_peft_model(base, LoraConfig(**{"target_modules": ["q_proj"]} | settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.1)
    row = make_row()
    with torch.no_grad():
        exact = recommender(model.get_base_model(), "cpu").eval()(RowInputs(row, CPU), "pair")
        found = recommender(model.bfloat16().get_base_model(), "cpu").eval()(RowInputs(row, CPU), "pair")
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_the_answers_loss_in_bfloat16_is_of_no_rounded_logits() -> None:
    """The difference of its two logits is that of which the other losses are made."""
    model, row = make_model(model_config(), torch.bfloat16), make_row()
    model.lm_head.weight.data *= 100
    with torch.no_grad():
        logits, pair = (recommender(model, "cpu")(RowInputs(row, CPU), want) for want in ("logits", "pair"))
    assert pair.abs().max() > 16 and torch.equal(logits[:, list(ANSWERS)], pair)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_is_as_near_to_float32_as_separate_sequences_are(kind: str) -> None:
    row = make_row(12)
    exact = one_by_one(make_model(model_config(kind)), row)
    model = make_model(model_config(kind), torch.bfloat16)
    shared, separate = run(recommender(model, "cpu"), row), one_by_one(model, row)
    spread = float(exact[0].std())
    assert float((shared[0] - exact[0]).abs().max()) < 2 * float((separate[0] - exact[0]).abs().max()) + 0.01 * spread
    assert relative(shared[1], exact[1]) < 2 * relative(separate[1], exact[1]) + 0.01


class TestNegativeControls:
    """What goes wrong must be seen by these tests: each fault moves the results by far more than the tolerance."""

    def test_positions_that_do_not_restart(self) -> None:
        model, row = make_model(model_config()), make_row()
        object.__setattr__(row, "position_ids", torch.arange(row.num_tokens).numpy())
        assert self._error(model, row, "cpu") > 1e-3

    def test_candidates_that_see_earlier_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def mask(layout: Layout) -> torch.Tensor:
            own, _ = layout.segments
            user = torch.cat([own[: layout.suffix_start], own.new_tensor(_owners(layout))])
            places = torch.arange(layout.num_tokens)
            return (user[None] == user[:, None]) & (places[None] <= places[:, None])

        monkeypatch.setattr(Layout, "mask", property(mask))
        assert self._error(make_model(model_config()), make_row(), "dense") > 1e-3

    def test_gradient_of_the_log_sum_exp_that_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The obvious merge of FlashAttention 2's outputs: right forward, dq and dk wrong by percents."""
        monkeypatch.setattr(backends, "tree_attention", _merge_without_gradient)
        model, row = make_model(model_config()), make_row()
        found, expected = run(recommender(model, "cpu"), row), one_by_one(model, row)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
        assert relative(found[1], expected[1]) > 1e-3

    @staticmethod
    def _error(model: nn.Module, row: PackedRow, backend: str) -> float:
        return float((run(recommender(model, backend), row)[0] - one_by_one(model, row)[0]).abs().max())


def _owners(layout: Layout) -> list[int]:
    return [user + 1 for user, total in enumerate(layout.suffix_totals) for _ in range(total)]


def _merge_without_gradient(q, k, v, code, number, answers_only, scale):  # noqa: ANN001, ANN202
    """Each call differentiable by itself, as FlashAttention 2 is, and log-sum-exps taken for constants."""
    layout, kernel = decoded(code, q.device), CpuKernel()
    calls = layout.answer_calls if answers_only else layout.calls

    class One(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, call):  # noqa: ANN001, ANN205
            out, lse = kernel.forward(q, k, v, call, scale)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.call = call
            ctx.mark_non_differentiable(lse)
            return out, lse

        @staticmethod
        def backward(ctx, grad, _):  # noqa: ANN001, ANN205
            return *kernel.backward(grad.contiguous(), ctx.saved_tensors, ctx.call, scale), None

    out, lse = One.apply(q, k[calls[0].keys], v[calls[0].keys], calls[0])
    for call in calls[1:]:
        part, part_lse = One.apply(q[call.queries], k[call.keys], v[call.keys], call)
        rows = call.queries
        total = torch.logaddexp(lse[:, rows], part_lse)
        old, new = ((x - total).exp().t()[..., None] for x in (lse[:, rows], part_lse))
        out = torch.cat([out[: rows.start], out[rows] * old + part * new, out[rows.stop :]])
        lse = torch.cat([lse[:, : rows.start], total, lse[:, rows.stop :]], dim=1)
    return out, lse
