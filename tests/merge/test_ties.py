"""Bases whose embedding is also their output head: the merged model computes what the adapter computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from tests.merge.models import load, make_adapter, make_base, tensors_of
from trsr_dist.files import read_json
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge

HEAD, EMBEDDING = ["q_proj", "lm_head"], ["q_proj", "embed_tokens"]
UNTYING: list[dict[str, Any]] = [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": HEAD},
    {"target_modules": EMBEDDING},
    {"target_modules": HEAD + EMBEDDING},
]
TYING: list[dict[str, Any]] = [
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": HEAD, "ensure_weight_tying": True},
    {"target_modules": EMBEDDING, "ensure_weight_tying": True},
]


@pytest.mark.parametrize(("settings", "tied"), [(s, False) for s in UNTYING] + [(s, True) for s in TYING])
def test_tied_bases(settings: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge(adapter, tmp_path / "merged", MergeOptions(verify="weights"))
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in tensors_of(tmp_path / "merged")) is not tied
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(base), adapter)(ids).logits
        found = load(tmp_path / "merged")(ids).logits
    assert (found - expected).abs().max() < 1e-4


def test_a_base_that_stores_its_tied_head_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True, shard_size="1GB")
    tensors = tensors_of(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for number, settings in enumerate((TYING[0], UNTYING[0])):
        adapter = make_adapter(base, tmp_path / f"adapter{number}", **settings)
        merge(adapter, tmp_path / f"merged{number}", MergeOptions(verify="scores"))
        found = tensors_of(tmp_path / f"merged{number}")
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]) == (number == 0)


def test_untouched_ties_stay(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    merge(make_adapter(base, tmp_path / "adapter"), tmp_path / "merged", MergeOptions(verify="weights"))
    assert "lm_head.weight" not in tensors_of(tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
