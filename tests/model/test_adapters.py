"""An adapter fits its base or is refused, by predict, evaluate's opening, a training's start and merge alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.merge.models import load, make_adapter, make_base, rename_tensors
from trsr_dist.errors import ConfigError, ModelError, TrsrError
from trsr_dist.files import read_json, write_json
from trsr_dist.merge.changes import check_mergeable
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.model.adapters import add_lora, attach, read_adapter
from trsr_dist.model.artifacts import base_fingerprint
from trsr_dist.predict import Ranker
from trsr_dist.pretrained import BaseSource
from trsr_dist.train.start import read_initial

LORA = {"r": 4, "alpha": 8, "use_rslora": False}
WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def made(base: Path) -> Path:
    return make_adapter(base, base.parent / "tuned")


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tuned"))


def ways(base: Path, adapter: Path) -> dict[str, Callable[[], Any]]:
    """All that open an adapter."""
    source, output = BaseSource(str(base)), adapter.parent / "merged"
    return {
        "predict": lambda: Ranker.open(str(adapter), device="cpu"),
        "train": lambda: read_initial(str(adapter), LORA, source, base_fingerprint(base)),
        "merge": lambda: merge(adapter, output, MergeOptions(verify="weights")),
    }


def refused(base: Path, adapter: Path, message: str) -> None:
    for name, act in ways(base, adapter).items():
        with pytest.raises(TrsrError, match=message):
            act()
            pytest.fail(f"{name} takes it")


def misname(tensors: Tensors) -> Tensors:
    return {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()}


def few(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn.q_proj" in name}


def one(tensors: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    first = min(name for name in tensors if "lora_A" in name)
    return tensors | {first: change(tensors[first])}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "all misnamed": (misname, r"16 tensors do not fit the base: .*layers\.0\.attention\.\S+ has no place"),
    "2 of 16": (few, r"14 tensors do not fit the base: model\.layers\.0\.self_attn\.k_proj\.lora_A\.weight is missing"),
    "NaN": (lambda tensors: one(tensors, lambda t: t * float("nan")), "holds NaN or infinity"),
    "infinity": (lambda tensors: one(tensors, lambda t: t / 0), "holds NaN or infinity"),
    "width": (lambda tensors: one(tensors, lambda t: t[:, :-1].contiguous()), "size mismatch|expected|another base"),
    "rank": (lambda tensors: one(tensors, lambda t: t[:-1].contiguous()), r"size mismatch|expected \(rank"),
    "whole numbers": (lambda tensors: one(tensors, lambda t: t.int()), "no tensor of floating type"),
    "nothing": (lambda tensors: {}, "holds no tensors"),
    "empty": (lambda tensors: one(tensors, lambda t: t[:0]), "is empty"),
    "untrained": (
        lambda tensors: {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()},
        "every LoRA B is zero",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_does_not_fit_is_refused_in_all_ways(base: Path, adapter: Path, fault: str) -> None:
    edit, message = FAULTS[fault]
    save_file(edit(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    refused(base, adapter, message)


def test_one_that_fits_is_taken_in_all_ways(base: Path, adapter: Path) -> None:
    """Else the refusals would say nothing."""
    for act in ways(base, adapter).values():
        act()


def test_a_copy_of_the_output_head_is_not_trained(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "tuned", target_modules=["q_proj", "lm_head"])
    with pytest.raises(TrsrError, match=r"holds lm_head\.base_layer\.weight .*save_embedding_layers=False"):
        ways(base, adapter)["train"]()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 8 + b"{}", b"{}"])
def test_damaged_files_are_named(base: Path, adapter: Path, content: bytes) -> None:
    (adapter / WEIGHTS).write_bytes(content)
    refused(base, adapter, rf"tuned/{WEIGHTS}: damaged, truncated or no adapter")
    (adapter / "adapter_config.json").write_bytes(content)
    refused(base, adapter, r"tuned/adapter_config\.json: (not valid JSON|'utf-8' codec|peft_type is None)")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "OF_TOMORROW"}, "peft_type is 'OF_TOMORROW'"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is .*expected a text"),
        ({"revision": 1}, "revision is '1', expected a text"),
        ({"r": "four"}, "adapter_config.json says four|not supported between|lora.r=4"),
        ({"of_tomorrow": 1}, "unknown settings"),
        ({"init_lora_weights": "pissa"}, "changes the base itself"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "Megatron layers"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"layers_pattern": "h"}, "layers_pattern"),
        ({"target_modules": ["no_such_layer"]}, "not found in the base model|do not fit"),
    ],
)
def test_settings_that_cannot_be_run_are_named(base: Path, adapter: Path, values: dict, message: str) -> None:
    write_json(adapter / "adapter_config.json", read_json(adapter / "adapter_config.json") | values)
    refused(base, adapter, message)


class Planted:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_read_without_its_code(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    for act in ways(base, adapter).values():
        act()
    shutil.rmtree(tmp_path / "merged")
    torch.save(tensors | {"planted": Planted(tmp_path / "mark")}, adapter / "adapter_model.bin")
    refused(base, adapter, r"adapter_model\.bin: .*it holds code, which is not run")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02garbage")
    refused(base, adapter, r"adapter_model\.bin: damaged")
    torch.save(["no names"], adapter / "adapter_model.bin")
    refused(base, adapter, "no tensor of floating type")
    assert not (tmp_path / "mark").exists()


def test_a_folder_that_is_adapter_and_model_is_ambiguous(base: Path, adapter: Path) -> None:
    shutil.copytree(base, adapter, dirs_exist_ok=True)
    refused(base, adapter, r"holds an adapter \(adapter_config\.json\) and the weights of a model")


KINDS: dict[str, dict[str, Any]] = {
    "regex": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rslora and dora": {"use_rslora": True, "use_dora": True},
    "layers": {"layers_to_transform": [1]},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "modules to save": {"modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "biases": {"target_modules": ["q_proj"], "lora_bias": True},
}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).unsqueeze(0)).logits


def assert_as_peft(base: Path, adapter: Path) -> None:
    expected, before = logits_of(PeftModel.from_pretrained(load(base), adapter)), logits_of(load(base))
    assert (expected - before).abs().max() > 1e-3
    assert torch.equal(logits_of(attach(load(base), read_adapter(adapter)).get_base_model().eval()), expected)


@pytest.mark.parametrize("name", KINDS)
def test_what_peft_reads_is_read(base: Path, tmp_path: Path, name: str) -> None:
    assert_as_peft(base, make_adapter(base, tmp_path / "tuned", **KINDS[name]))


@pytest.mark.parametrize(
    "config", [LoHaConfig(r=4, target_modules=["q_proj"]), IA3Config(target_modules=["k_proj"], feedforward_modules=[])]
)
def test_other_kinds_than_lora_can_be_run_and_not_merged(base: Path, tmp_path: Path, config: Any) -> None:
    model = get_peft_model(load(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.5, 0.2)
    model.save_pretrained(tmp_path / "tuned")
    assert_as_peft(base, tmp_path / "tuned")
    with pytest.raises(ModelError, match="only LORA adapters can be merged"):
        check_mergeable(tmp_path, config)


def test_names_of_older_libraries(tmp_path: Path) -> None:
    """GPT-2 of the hub stores its base without ``transformer.``; adapters have it all the same."""
    base = make_base(tmp_path / "base", "gpt2", tied=True)
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = make_adapter(base, tmp_path / "tuned", **settings)
    rename_tensors(base, lambda name: name.removeprefix("transformer."))
    assert_as_peft(base, adapter)


def test_all_linear_layers_of_a_mixture_of_experts_are_refused_before_the_training() -> None:
    """PEFT takes the experts' bare parameters for linear layers, too, and those cannot be merged."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**sizes, **experts, num_key_value_heads=2, head_dim=8)
    settings = {"r": 4, "alpha": 8, "dropout": 0.0, "use_rslora": False, "init": "kaiming"}
    with pytest.raises(ConfigError, match=r"bare parameters too \(down_proj, .*the attention: \['k_proj', 'o_proj'"):
        add_lora(AutoModelForCausalLM.from_config(config), 0, target_modules="all-linear", **settings)
    model = AutoModelForCausalLM.from_config(config)
    assert not add_lora(model, 0, target_modules=["q_proj"], **settings).target_parameters
