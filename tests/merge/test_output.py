"""The written folder: laid out as servers expect, loaded by nothing but transformers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from tests.merge.models import load, make_adapter, make_base, make_checkpoint, tensors_of
from tests.spawn import run_script
from tests.tokenizers import byte_level
from trsr_dist.config.sections import PromptSection
from trsr_dist.files import read_json
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.merge.scores import built_in_samples
from trsr_dist.model.loading import open_prompts
from trsr_dist.shards.manifest import write_split_manifest
from trsr_dist.shards.writer import write_shard

ROOT = Path(__file__).parents[2]
WEIGHTS_ONLY = MergeOptions(verify="weights")
DEFAULTS = PromptSection().model_dump(mode="json")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    (base / "LICENSE.txt").write_text("terms")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("x")
    (base / "training_args.bin").write_bytes(b"not for servers")
    return base


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    return make_checkpoint(base, tmp_path / "run" / "checkpoints" / "step-000007")


def test_other_files_and_model_card(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    merge(checkpoint, output, WEIGHTS_ONLY)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt"):
        assert (output / name).read_bytes() == (base / name).read_bytes(), name
    assert (output / "additional_chat_templates" / "tools.jinja").is_file()
    assert not (output / "training_args.bin").exists()
    card = (output / "README.md").read_text()
    assert card.startswith("---\nbase_model:") and "To be filled in" in card
    provenance = read_json(output / "provenance.json")
    assert provenance["prompt"]["style"] == "chat" and len(provenance["answer_ids"]) == 2
    assert provenance["merge"]["verification"]["weights"]["num_changed"] == 8
    assert "additional_chat_templates/tools.jinja" in read_json(output / "manifest.json")["files"]


def test_an_adapter_without_a_recorded_prompt_is_ranked_as_its_merge(checkpoint: Path, tmp_path: Path) -> None:
    """Each command's own settings hold for both; a classifier's answers are fixed, by the default settings."""
    copy = Path(shutil.copytree(checkpoint / "adapter", tmp_path / "copy"))
    for head in ("causal", "classifier"):
        merge(copy, tmp_path / head, MergeOptions(head=head, verify="weights"))
    settings = PromptSection(recent_items=3).model_dump()
    adapter, merged = (open_prompts(str(path), settings) for path in (copy, tmp_path / "causal"))
    assert merged.builder.settings == adapter.builder.settings
    assert not {"prompt", "answer_ids"} & merged.provenance.keys()
    assert read_json(tmp_path / "classifier" / "provenance.json")["prompt"] == DEFAULTS | {"style": "chat"}
    merge(checkpoint / "adapter", tmp_path / "inside", WEIGHTS_ONLY)
    assert read_json(tmp_path / "inside" / "provenance.json")["merge"]["source"] == "checkpoint step-000007"


def test_scores_are_compared_on_the_runs_own_users(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "shards" / "valid"
    shard = write_shard(folder / "valid-000000.tar", built_in_samples("news")[:2])
    write_split_manifest(folder, [shard], {}, {})
    merge(checkpoint, tmp_path / "merged", MergeOptions(verify="scores"))
    figures = read_json(tmp_path / "merged" / "provenance.json")["merge"]["verification"]["scores"]
    assert (figures["prompts"], figures["num_users"], figures["num_prompts"]) == ("shards/valid", 2, 12)


def test_a_split_without_users_is_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    """As data.split=[10,0,1] makes it."""
    write_split_manifest(tmp_path / "run" / "shards" / "valid", [], {}, {})
    merge(checkpoint, tmp_path / "merged", MergeOptions(verify="scores"))
    figures = read_json(tmp_path / "merged" / "provenance.json")["merge"]["verification"]["scores"]
    assert figures["prompts"] == "built-in prompts"


def test_loads_with_nothing_but_transformers(checkpoint: Path, tmp_path: Path) -> None:
    merge(checkpoint, tmp_path / "merged", WEIGHTS_ONLY)
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], return_tensors='pt')['input_ids']\n"
        "print(model.dtype, model(ids).logits.shape[-1], 'trsr_dist' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["torch.bfloat16", str(len(byte_level(chat=True)) + 6), "False"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_converts_every_tensor_and_the_config(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    merge(checkpoint, tmp_path / "merged", MergeOptions(dtype=dtype, verify="weights"))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "merged").values()} == {getattr(torch, dtype)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == getattr(torch, dtype)


def test_max_shard_size(checkpoint: Path, tmp_path: Path) -> None:
    merge(checkpoint, tmp_path / "merged", MergeOptions(verify="weights", max_shard_size=20_000))
    merge(checkpoint, tmp_path / "plain", WEIGHTS_ONLY)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    index = read_json(tmp_path / "merged" / "model.safetensors.index.json")
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert len(files) > 3 and index["metadata"]["total_size"] < sum(path.stat().st_size for path in files)
    one, other = load(tmp_path / "merged").state_dict(), load(tmp_path / "plain").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_attn", "c_proj", "lm_head"], ["attn.c_proj", "lm_head"]])
def test_transposed_layers(targets: list[str], tmp_path: Path) -> None:
    """With those that are not, PEFT's setting tells of the last one alone; attention's projection is square."""
    tokenizer = byte_level()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"target_modules": targets, "fan_in_fan_out": True}
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", **settings)
    merge(adapter, tmp_path / "merged", MergeOptions(verify="scores"))


def test_run_folder_that_was_moved_finds_its_own_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "old" / "base")
    make_checkpoint(base, tmp_path / "old" / "checkpoints" / "step-000007")
    (tmp_path / "old").rename(tmp_path / "new")
    merge(tmp_path / "new" / "checkpoints" / "step-000007", tmp_path / "new" / "merged", WEIGHTS_ONLY)
    assert (tmp_path / "new" / "merged" / "config.json").is_file()


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "merge_lora.py"), *map(str, arguments)]


def test_command_line(checkpoint: Path, tmp_path: Path) -> None:
    merged = tmp_path / "run" / "merged"
    before = sorted(tmp_path.rglob("*"))
    common = "tools/merge_lora.py", "--checkpoint", checkpoint, "--output", merged
    dry = run_script(*common, "--dry-run")
    assert dry.returncode == 0 and "would write" in dry.stdout
    only = run_script(*common, "--dry-run", "--adapter-only")
    assert only.stdout.splitlines()[-1] != dry.stdout.splitlines()[-1], "the adapter's bytes, not the model's"
    assert sorted(tmp_path.rglob("*")) == before
    failed = run_script(*common, "--tolerance", "-1")
    assert failed.returncode == 1 and failed.stderr.startswith("error: scores of base + adapter")
    assert sorted(tmp_path.rglob("*")) == before
    done = run_script(*common, "--max-shard-size", "0.02MB")
    assert done.returncode == 0 and "largest difference" in done.stdout and "pairs change order" in done.stdout
    assert AutoTokenizer.from_pretrained(merged).chat_template
