"""Merged folders equal PEFT's own merge, for every architecture and kind of adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.merge.models import (
    load,
    make_adapter,
    make_base,
    make_checkpoint,
    random_peft_model,
    rename_tensors,
    tensors_of,
)
from trsr_dist.files import read_json, sha256_of
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge

WEIGHTS_ONLY = MergeOptions(verify="weights")
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.o_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "layers": {"layers_to_transform": [1]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules-to-save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["norm"]},
    "biases": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
}


def assert_equals_peft(merged: Path, base: Path, **settings: Any) -> None:
    expected = random_peft_model(base, **settings).merge_and_unload().state_dict()
    found = load(merged).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_architectures(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", kind)
    merge(make_checkpoint(base, tmp_path / "step-000007"), tmp_path / "merged", WEIGHTS_ONLY)
    assert_equals_peft(tmp_path / "merged", base)


@pytest.mark.parametrize("name", ADAPTERS)
def test_kinds_of_adapters(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    merge(make_adapter(base, tmp_path / "adapter", **ADAPTERS[name]), tmp_path / "merged", WEIGHTS_ONLY)
    assert_equals_peft(tmp_path / "merged", base, **ADAPTERS[name])


@pytest.mark.parametrize("stored", ["with its head", "without"])
def test_a_base_that_was_saved_without_its_head(stored: str, tmp_path: Path) -> None:
    """GPT-2 of the hub is such a one: ``h.0`` instead of ``transformer.h.0``."""
    base = make_base(tmp_path / "base", "gpt2", tied=True)
    if stored == "without":
        rename_tensors(base, lambda name: name.removeprefix("transformer."))
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    merge(make_adapter(base, tmp_path / "adapter", **settings), tmp_path / "merged", MergeOptions(verify="scores"))
    assert tensors_of(tmp_path / "merged").keys() == tensors_of(base).keys()
    assert_equals_peft(tmp_path / "merged", base, **settings)


def test_modules_that_only_the_files_have_are_no_targets(tmp_path: Path) -> None:
    """Heads that predict further tokens lie beside the layers; transformers leaves them out."""
    base = make_base(tmp_path / "base")
    head = {"model.layers.2.self_attn.q_proj.weight": torch.ones(32, 32)}
    rename_tensors(base, str, **head)
    merge(make_adapter(base, tmp_path / "adapter"), tmp_path / "merged", WEIGHTS_ONLY)
    assert_equals_peft(tmp_path / "merged", base)
    assert torch.equal(tensors_of(tmp_path / "merged")[next(iter(head))], torch.ones(32, 32))


def test_untouched_tensors_keep_their_bytes_and_runs_are_identical(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    checkpoint = make_checkpoint(base, tmp_path / "step-000007")
    for name in ("one", "two"):
        merge(checkpoint, tmp_path / name, WEIGHTS_ONLY)
    before, after = tensors_of(base), tensors_of(tmp_path / "one")
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        changed = any(target in name for target in ("q_proj", "k_proj", "v_proj", "o_proj"))
        assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)) != changed, name
    for path in sorted((tmp_path / "one").iterdir()):
        assert sha256_of(path) == sha256_of(tmp_path / "two" / path.name), path.name


def test_bfloat16_is_the_float32_merge_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    merge(make_checkpoint(base, tmp_path / "step-000007"), tmp_path / "merged", WEIGHTS_ONLY)
    expected = random_peft_model(base).merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_scores_are_compared_and_recorded(dtype: str, tolerance: float, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    merge(make_checkpoint(base, tmp_path / "step-000007"), tmp_path / "merged", MergeOptions(verify="scores"))
    figures = read_json(tmp_path / "merged" / "provenance.json")["merge"]["verification"]["scores"]
    assert figures["num_prompts"] == 36 and figures["num_pairs"] == 90
    assert 0 <= figures["mean_difference"] <= figures["largest_difference"] <= tolerance == figures["tolerance"]


def test_adapter_in_an_old_pickle_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    merge(adapter, tmp_path / "merged", WEIGHTS_ONLY)
    assert_equals_peft(tmp_path / "merged", base)
