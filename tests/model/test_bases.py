"""A base is whole, plain and sound, or every command refuses it at its start: with the remedy, without a question."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.merge.models import make_adapter, make_base, tensors_of
from tests.summarize.world import engine_settings
from trsr_dist.bases import BaseName
from trsr_dist.config import Config
from trsr_dist.config.sections import PromptSection
from trsr_dist.environment import Ranks
from trsr_dist.errors import TrsrError
from trsr_dist.files import read_json, write_json
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.model.artifacts import base_fingerprint, follow
from trsr_dist.model.loading import find_base, open_prompts
from trsr_dist.planner.job import Inputs
from trsr_dist.predict import Ranker, Request
from trsr_dist.pretrained import BaseSource, load_config, load_tokenizer
from trsr_dist.run import RunFolder
from trsr_dist.summarize.engines.transformers import TransformersEngine
from trsr_dist.train.model import base_source


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_adapter(make_base(folder / "base", shard_size="1GB"), folder / "tuned")
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A folder with a base, and an adapter of it."""
    shutil.copytree(sound, tmp_path / "place")
    config = read_json(tmp_path / "place" / "tuned" / "adapter_config.json")
    named = {"base_model_name_or_path": str(tmp_path / "place" / "base")}
    write_json(tmp_path / "place" / "tuned" / "adapter_config.json", config | named)
    return tmp_path / "place"


def config_of(base: Path) -> Config:
    return Config.model_validate({"data": {"format": "demo"}, "model": {"name_or_path": str(base)}})


def train(base: Path) -> None:
    """What a training does before it looks at its data."""
    source, _ = base_source(config_of(base), RunFolder(base.parent), Ranks(0, 1, 0, 1))
    load_tokenizer(source), load_config(source)


def commands(place: Path) -> dict[str, Callable[[], Any]]:
    base, adapter, no_base = place / "base", place / "tuned", BaseName("", "", "")
    summarizer = engine_settings(str(base), precision="float32", prompt_style="plain")
    return {
        "train": lambda: train(base),
        "predict a base": lambda: Ranker.open(str(base), device="cpu"),
        "predict an adapter": lambda: Ranker.open(str(adapter), device="cpu"),
        "evaluate the base": lambda: Ranker.open(str(find_base(str(adapter), no_base, place, "")), device="cpu"),
        "merge": lambda: merge(adapter, place / "merged", MergeOptions(verify="weights", dry_run=True)),
        "plan": lambda: Inputs(config_of(base), "float32").shape,
        "summarize": lambda: TransformersEngine.load(summarizer),
    }


def refused(place: Path, message: str, *left_out: str) -> None:
    for name, act in commands(place).items():
        if name not in left_out:
            with pytest.raises(TrsrError, match=message):
                act()
                pytest.fail(f"{name} takes it")


def test_a_sound_base_is_taken_by_all(place: Path) -> None:
    """Else the refusals would say nothing."""
    for act in commands(place).values():
        act()


def test_an_adapter_in_the_folder(place: Path) -> None:
    """transformers would load base and adapter as one, without a word; ZeRO-3 the base alone."""
    for path in (place / "tuned").glob("adapter_*"):
        shutil.copy(path, place / "base")
    message = r"base: holds adapter_config\.json.*(train\.init_adapter|of their own)|holds an adapter .* of a model"
    refused(place, message)
    (place / "base" / "model.safetensors").unlink()
    refused(place, r"base: holds adapter_config\.json|names the folder itself", "predict a base")


def test_pickles_alone(place: Path) -> None:
    torch.save(load_file(place / "base" / "model.safetensors"), place / "base" / "pytorch_model.bin")
    (place / "base" / "model.safetensors").unlink()
    refused(place, r"pytorch_model\.bin, a pickle, which can run code.*save_pretrained", "plan")


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "custom"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("model_type", ["custom", None])
def test_custom_code_runs_only_where_allowed(
    place: Path, monkeypatch: pytest.MonkeyPatch, model_type: str | None
) -> None:
    base, mark = place / "base", place / "mark"
    (base / "own.py").write_text(CODE.format(mark=str(mark)))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = {key: value for key, value in read_json(base / "config.json").items() if key != "model_type"}
    named = {} if model_type is None else {"model_type": model_type}
    write_json(base / "config.json", config | named | {"auto_map": own})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    refused(place, r"custom code.*trust_remote_code=true.*merge_lora\.py runs none")
    assert not mark.exists() and sys.stdin.tell() == 0, "nothing is asked"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "modules"))
    Ranker.open(str(base), device="cpu", trust_remote_code=True)
    assert mark.exists() and sys.stdin.tell() == 0


def test_code_of_a_tokenizer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "base" / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    write_json(path, read_json(path) | own)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    refused(place, "tokenizer cannot be read .*custom code", "plan")
    assert sys.stdin.tell() == 0


def edited(place: Path, **values: Any) -> None:
    path = place / "base" / "config.json"
    write_json(path, read_json(path) | values)


CONFIGS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "binary": (b"\xff\xfe\x00", "config.json: "),
    "a list": (b"[1]", "expected an object"),
    "nested": (b"[" * 100_000, "not valid JSON"),
    "no model_type": (b'{"hidden_size": 4}', "names no model_type"),
    "another type": (b'{"model_type": 7}', "names no model_type"),
    "unknown": (b'{"model_type": "of_tomorrow"}', "of_tomorrow"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_config(place: Path, name: str) -> None:
    content, message = CONFIGS[name]
    (place / "base" / "config.json").write_bytes(content)
    refused(place, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 64}, r"has shape .* config\.json says"),
        ({"vocab_size": 7}, r"has shape .* config\.json says \(7, 32\)"),
        ({"num_hidden_layers": 3}, "are missing, the first is model.layers.2"),
        ({"num_hidden_layers": 10**9}, "config.json says 1000000000 layers"),
        ({"hidden_size": "wide"}, "config.json|cannot be read"),
        ({"num_attention_heads": 0}, "cannot be read"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected 1 or more"),
    ],
)
def test_a_config_of_another_model(place: Path, values: dict, message: str) -> None:
    edited(place, **values)
    refused(place, message)


def save(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, place / "base" / "model.safetensors", metadata={"format": "pt"})


def test_tensors_of_another_kind(place: Path) -> None:
    tensors = tensors_of(place / "base")
    save(place, tensors | {"model.norm.weight": tensors["model.norm.weight"].int()})
    refused(place, r"model\.norm\.weight has dtype I32, expected a floating type")
    save(place, {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name})
    refused(place, r"9 are missing, the first is model\.layers\.1\.")


HEADERS: dict[str, bytes] = {
    "longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "of no length": b"",
    "zeros": bytes(100),
    "no JSON": struct.pack("<Q", 3) + b"{{{",
    "nested": struct.pack("<Q", 90_000) + b"[" * 90_000,
    "overlapping": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_lying_headers(place: Path, name: str) -> None:
    content = HEADERS[name]
    if name == "overlapping":
        facts = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        header = json.dumps({"a": facts, "b": facts}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(8)
    (place / "base" / "model.safetensors").write_bytes(content)
    refused(place, r"model\.safetensors: ")


def test_truncated_and_unreadable_files(place: Path) -> None:
    path = place / "base" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    refused(place, r"model\.safetensors: .* truncated; copy it again")
    path.unlink()
    os.mkfifo(path)
    refused(place, r"base: no weights", "plan")
    (place / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../tuned/x.safetensors"}}')
    refused(place, "names files outside its folder")


def test_a_file_beside_those_of_the_index_is_not_read(place: Path) -> None:
    """Copies of the weights in their authors' form lie beside them; transformers reads those of the index alone."""
    base = place / "base"
    save_file({"model.norm.weight": torch.zeros(32)}, base / "consolidated.safetensors")
    other = tensors_of(base) | {"model.norm.weight": torch.full((32,), 9.0)}
    save_file(other, base / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(other, "model-00001-of-00001.safetensors")
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    merge(place / "tuned", place / "merged", MergeOptions(verify="scores"))
    single = load_file(base / "model.safetensors")["model.norm.weight"]
    assert torch.equal(tensors_of(place / "merged")["model.norm.weight"], single), "as transformers chooses"


def test_a_base_with_its_own_code_is_fetched_with_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(place / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    path = place / "tuned" / "adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": "team/own-code"})
    for allowed in (False, True):
        open_prompts(str(path.parent), PromptSection().model_dump(), allowed)
    assert ["*.py" in patterns for patterns in asked] == [False, True]


def test_an_adapter_is_named_by_its_hub_id(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local cache, as on a node without a network."""
    copy = tmp_path / "hub" / "models--team--tuned"
    shutil.copytree(place / "tuned", copy / "snapshots" / ("a" * 40))
    (copy / "refs").mkdir()
    (copy / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    request = Request(items=("title: tea",), candidates=("title: cups", "title: rain"))
    named, local = (Ranker.open(name, device="cpu").rank(request) for name in ("team/tuned", str(place / "tuned")))
    assert named.candidates == local.candidates


def test_a_second_copy_of_the_weights_does_not_make_another_base(place: Path) -> None:
    """Hub downloads have it or leave it out; transformers never reads it."""
    found = base_fingerprint(place / "base")
    save_file({"norm.weight": torch.zeros(32)}, place / "base" / "consolidated.safetensors")
    assert base_fingerprint(place / "base") == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"base": []}', "base: "),
        (b'{"answer_ids": "yes"}', "answer_ids: "),
        (b'{"domain": "songs"}', "domain: 'songs', expected one of news, products, items; .* update this package"),
        (b'{"prompt": {"of_tomorrow": 1}}', "prompt: of_tomorrow: "),
        (b'{"prompt": {"max_tokens": "many"}}', "prompt: max_tokens: "),
    ],
)
def test_a_damaged_record_of_the_training(place: Path, content: bytes, message: str) -> None:
    for name in ("base", "tuned"):
        (place / name / "provenance.json").write_bytes(content)
    for name in ("predict a base", "predict an adapter", "merge"):
        with pytest.raises(TrsrError, match=rf"provenance\.json: {message}"):
            commands(place)[name]()


def test_pointers_that_lead_nowhere(place: Path) -> None:
    (place / "checkpoints" / "step-000001").mkdir(parents=True)
    for content in (b"", b"\xff\xfe", b"../base", b"x" * 5000):
        (place / "checkpoints" / "latest").write_bytes(content)
        with pytest.raises(TrsrError, match="latest: names"):
            Ranker.open(str(place), device="cpu")


def test_a_run_names_its_best_checkpoint_else_its_latest(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for name, step in {"latest": "step-000002", "best": "step-000001"}.items():
        (checkpoints / step).mkdir(parents=True)
        (checkpoints / name).write_text(f"{step}\n")
        assert follow(tmp_path) == follow(checkpoints) == checkpoints / step
    assert follow(checkpoints / "latest") == checkpoints / "step-000002"


def test_an_adapter_may_lie_in_a_folder_called_adapter(place: Path) -> None:
    """As one of a checkpoint does."""
    (place / "tuned").rename(place / "adapter")
    Ranker.open(str(place / "adapter"), device="cpu")


def test_a_quantized_base_keeps_its_names_and_shapes(place: Path) -> None:
    """Its tensors are packed: what the library reads is not compared here, but what it is not for is still said."""
    edited(place, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert load_config(BaseSource(str(place / "base"))).quantization_config
    with pytest.raises(TrsrError, match="a quantized model; name its unquantized original"):
        commands(place)["merge"]()
