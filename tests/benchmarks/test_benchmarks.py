"""The suites compare like with like: every way of a suite computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import reduce, scoring, serving, summarize, training
from benchmarks.common import Row, as_json, ratio_row, table
from benchmarks.ways import MEASURED, SHAPE, Way, make_user
from tests.predict.world import make_folder

CONFIG = LlamaConfig(**(SHAPE | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}))
USER = make_user("user", 40, (7, 5))


def gradients(model: torch.nn.Module, way: Way) -> dict[str, torch.Tensor]:
    model.zero_grad()
    way.step()
    return {name.removeprefix("causal."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_ways_of_training_give_the_same_gradients() -> None:
    bench = training.Bench(CONFIG, 1.0)
    with torch.no_grad():
        for name, parameter in bench._model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ours = gradients(bench.shared, bench.ours([USER]))
    ways = {
        "padded": (bench.stock, bench.padded([USER])),
        "packed": (bench.blocks, bench.packed([USER])),
        "nothing left out": (bench.shared, bench.ours([USER], answers_only=False, reach_inputs=True)),
    }
    assert len(ours) == 16
    for name, (model, way) in ways.items():
        found = gradients(model, way)
        assert found.keys() == ours.keys()
        for key, value in ours.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4, msg=f"{name}: {key}")


def test_some_prompts_stand_for_all() -> None:
    bench = training.Bench(CONFIG, 1.0)
    many = make_user("user", 40, (6,) * 21)
    for way in (bench.padded([many]), bench.packed([many])):
        assert way.factor == pytest.approx(21 / MEASURED)
    assert bench.padded([many]).flops > bench.packed([many]).flops > 5 * bench.ours([many]).flops


def test_a_users_scores_are_counted_in_falling_order_of_waste() -> None:
    bench = scoring.Bench(CONFIG, 1.0)
    user = make_user("user", 40, (6,) * scoring.CANDIDATES)
    ways = [bench.padded(user), bench.alone(user), bench.packed(user), bench.sharing(user), bench.ours([user])]
    flops = [way.flops for way in ways]
    assert flops == sorted(flops, reverse=True)
    assert len(set(flops)) == len(ways)


def test_rankings_with_kept_prefixes_are_those_without(tmp_path: Path) -> None:
    (missing,) = serving.run(1.0)
    assert "--model" in missing.note
    rows = serving.run(0.25, model=str(make_folder(tmp_path / "merged")))
    assert [row.unit for row in rows] == [*["items/s"] * 2, *["items/CPU-s"] * 2, "log-odds", "items/s"]
    assert 0 < rows[4].value < 1e-5 and "--vllm" in rows[-1].note


def test_a_rows_share_is_that_of_its_bound() -> None:
    row = ratio_row("training", "case", "other / ours", [3.0, 4.0, 9.0], [1.0, 2.0, 3.0], bound=6.0)
    assert (row.value, row.low, row.high, row.share) == (3.0, 2.0, 3.0, 0.5)
    assert as_json(row)["share"] == 0.5
    header, line = table([row]).splitlines()
    assert header.split() == ["suite", "case", "measure", "value", "unit", "spread", "bound", "share", "note"]
    assert "2 to 3" in line and line.endswith("0.50")
    assert as_json(Row("stream", "case", "fill", 1.0, "share"))["share"] is None
    assert as_json(Row("trl", "case", "not run", float("nan"), "x"))["value"] is None


def test_ragged_prompts_are_of_all_lengths() -> None:
    tokenizer = summarize.make_tokenizer()
    lengths = [len(tokenizer(request.prompt.text())["input_ids"]) for request in summarize.ragged(tokenizer, 16)]
    low, high = summarize.TOKENS_IN
    assert low <= min(lengths) < 0.3 * high and 0.8 * high < max(lengths) <= high
    assert len(set(lengths)) > 12


def test_made_scores_are_reduced_to_metrics() -> None:
    rows = reduce.run(0.015)
    assert [row.unit for row in rows] == ["CPU-s", "CPU-min", "MB"]
    assert rows[0].case.startswith("150 test users of 21 candidates, 6 systems")
    assert all(row.value > 0 for row in rows)
