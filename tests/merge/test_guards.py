"""Inputs that must not be merged: a clear error, nothing half-written, the old output kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.disks import FULL, mounted_disk
from tests.kills import check_stage
from tests.merge.models import make_adapter, make_base, make_checkpoint, seal, tensors_of
from trsr_dist.errors import TrsrError
from trsr_dist.files import read_json, write_json
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge

WEIGHTS_ONLY = MergeOptions(verify="weights")
ADAPTER = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    return make_checkpoint(base, tmp_path / "checkpoints" / "step-000007")


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    """By itself, so that no fingerprint of its base is known."""
    return Path(shutil.copytree(checkpoint / "adapter", tmp_path / "adapter"))


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def refuses(source: Path, output: Path, message: str, options: MergeOptions = WEIGHTS_ONLY) -> None:
    """The error names the fault, and nothing new stands beside the output."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(TrsrError) as caught:
        merge(source, output, options)
    assert message in str(caught.value)
    assert sorted(output.parent.iterdir()) == before


def test_another_base(checkpoint: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "llama")
    tensors = load_file(next(other.glob("*.safetensors")))
    tensors[min(tensors)].add_(0.25)
    save_file(tensors, next(other.glob("*.safetensors")), metadata={"format": "pt"})
    refuses(checkpoint, tmp_path / "merged", "fingerprint", MergeOptions(base=str(other)))


def test_another_architecture_without_a_fingerprint(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["up_proj"])
    small = make_base(tmp_path / "other")
    name = first(load_file(adapter / "adapter_model.safetensors"), "lora_A")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    refuses(adapter, tmp_path / "merged", "another base", MergeOptions(base=str(small)))


def test_another_vocabulary(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = first(tensors, "embed_tokens")
    tensors[name] = torch.cat([tensors[name], tensors[name][:3]])
    save_file(tensors, adapter / "adapter_model.safetensors")
    refuses(adapter, tmp_path / "merged", "size mismatch for model.embed_tokens")


def test_another_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    provenance = read_json(checkpoint / "provenance.json")
    provenance["answer_ids"] = [5, 6]
    write_json(checkpoint / "provenance.json", provenance)
    seal(checkpoint)
    refuses(checkpoint, tmp_path / "merged", "the tokenizer files are not those of the training")


def test_base_without_a_tokenizer(base: Path, adapter: Path, tmp_path: Path) -> None:
    for path in base.glob("*token*"):
        path.unlink()
    refuses(adapter, tmp_path / "merged", "its tokenizer cannot be read")


def test_bases_that_cannot_be_streamed(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = read_json(base / "config.json")
    write_json(base / "config.json", config | {"quantization_config": {"quant_method": "awq"}})
    refuses(adapter, tmp_path / "merged", "unquantized original")
    write_json(base / "config.json", config | {"model_type": "unheard_of", "auto_map": {"AutoConfig": "x.Y"}})
    refuses(adapter, tmp_path / "merged", "custom code")
    write_json(base / "config.json", config | {"vocab_size": 7})
    refuses(adapter, tmp_path / "merged", "config.json says (7, 32)")
    write_json(base / "config.json", config)
    sorted(base.glob("*.safetensors"))[0].unlink()
    refuses(adapter, tmp_path / "merged", "missing")
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    refuses(adapter, tmp_path / "merged", "safetensors")


def test_base_that_is_nowhere(checkpoint: Path, tmp_path: Path) -> None:
    refuses(checkpoint, tmp_path / "merged", "with --base", MergeOptions(base=str(tmp_path / "nowhere" / "at all")))


def test_truncated_files(base: Path, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / ADAPTER, 1000)
    refuses(tmp_path / "cut", tmp_path / "merged", "truncated or changed")
    shard = sorted(base.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 8)
    refuses(adapter, tmp_path / "merged", "truncated")


def test_unfinished_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    refuses(checkpoint, tmp_path / "merged", "was not written to its end")


def test_pointers_and_what_they_lack(checkpoint: Path, tmp_path: Path) -> None:
    latest = checkpoint.parent / "latest"
    refuses(tmp_path, tmp_path / "merged", "no complete checkpoint")
    latest.write_text("step-000009\n")
    refuses(tmp_path, tmp_path / "merged", "'step-000009'")
    latest.write_text(checkpoint.name + "\n")
    for number, path in enumerate((tmp_path, checkpoint.parent, latest)):
        merge(path, tmp_path / f"merged-{number}", WEIGHTS_ONLY)
        assert (tmp_path / f"merged-{number}" / "config.json").is_file()


def test_output_with_foreign_files_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refuses(checkpoint, tmp_path / "mine", "holds files")
    refuses(checkpoint, tmp_path / "mine", "no earlier merge", MergeOptions(force=True))
    refuses(checkpoint, tmp_path / "mine", "no earlier merge", MergeOptions(update=True))
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_output_must_not_be_an_input(base: Path, checkpoint: Path) -> None:
    refuses(checkpoint, base, "is or holds the input")
    refuses(checkpoint, checkpoint.parent, "is or holds the input")


def test_rerun_does_nothing_and_force_redoes(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    merge(checkpoint, output, WEIGHTS_ONLY)
    before = (output / "config.json").stat()
    merge(checkpoint, output, WEIGHTS_ONLY)
    assert (output / "config.json").stat().st_ino == before.st_ino
    refuses(checkpoint, output, "dtype", MergeOptions(dtype="bfloat16"))
    merge(checkpoint, output, MergeOptions(dtype="bfloat16", verify="weights", force=True))
    assert {tensor.dtype for tensor in tensors_of(output).values()} == {torch.bfloat16}
    update = MergeOptions(update=True, verify="weights")
    merge(checkpoint, output, update)
    assert {tensor.dtype for tensor in tensors_of(output).values()} == {torch.float32}
    before = (output / "config.json").stat()
    merge(checkpoint, output, update)
    assert (output / "config.json").stat().st_ino == before.st_ino, "nothing has changed since"
    merge(output, tmp_path / "again", MergeOptions())
    assert not (tmp_path / "again").exists()


def verification(output: Path) -> dict:
    return read_json(output / "provenance.json")["merge"]["verification"]


def test_a_merge_that_was_not_checked_as_asked_is_not_current(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    merge(checkpoint, output, MergeOptions(verify="none"))
    for verify, lacking in (("auto", "weights"), ("weights", "weights"), ("scores", "scores")):
        refuses(checkpoint, output, f"its {lacking} were not compared", MergeOptions(verify=verify))
    merge(checkpoint, output, MergeOptions(verify="weights", update=True))
    merge(checkpoint, output, MergeOptions())
    assert verification(output).keys() == {"weights"}
    merge(checkpoint, output, MergeOptions(verify="scores", update=True))
    assert verification(output)["scores"]["num_prompts"] == 36
    number = (output / "config.json").stat().st_ino
    for verify in ("none", "weights", "auto", "scores"):
        merge(checkpoint, output, MergeOptions(verify=verify, tolerance=1.0))
    assert (output / "config.json").stat().st_ino == number
    refuses(checkpoint, output, "allowed is --tolerance -1", MergeOptions(tolerance=-1.0))


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"head": "classifier"}, "--head"),
        ({"dtype": "float32"}, "--dtype"),
        ({"max_shard_size": 10**6}, "--max-shard-size"),
        ({"verify": "scores"}, "--verify"),
        ({"tolerance": 0.5}, "--tolerance"),
    ],
)
def test_options_of_merged_weights_where_none_are_written(
    option: dict, flag: str, checkpoint: Path, tmp_path: Path
) -> None:
    only = MergeOptions(adapter_only=True, **option)
    refuses(checkpoint, tmp_path / "adapter", f"--adapter-only writes no merged weights; leave it out, or {flag}", only)
    (tmp_path / "merged").mkdir()
    write_json(tmp_path / "merged" / "config.json", {})
    write_json(tmp_path / "merged" / "provenance.json", {"merge": {"source": "checkpoint step-000007"}})
    message = f"holds no adapter, so that {flag} cannot be followed; name with --checkpoint what it was made from "
    refuses(tmp_path / "merged", tmp_path / "more", message + "(checkpoint step-000007)", MergeOptions(**option))
    refuses(tmp_path / "merged", tmp_path / "more", "--adapter-only cannot be", MergeOptions(adapter_only=True))


def test_failed_redo_keeps_the_old_output(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    merge(checkpoint, output, WEIGHTS_ONLY)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    refuses(checkpoint, output, "differ by up to", MergeOptions(force=True, verify="scores", tolerance=-1.0))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize("name", ["merged", "merged[v2]"])
def test_what_a_killed_merge_left_is_put_right(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / f".{name}.tmp-host-1").mkdir()
    os.utime(tmp_path / f".{name}.tmp-host-1", (1, 1))
    merge(checkpoint, tmp_path / f".{name}.old-host-1", WEIGHTS_ONLY)
    number = (tmp_path / f".{name}.old-host-1").stat().st_ino
    merge(checkpoint, tmp_path / name, WEIGHTS_ONLY)
    assert (tmp_path / name).stat().st_ino == number, "found again, not made again"
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == [name]


def test_killed_at_every_change_while_it_is_redone(checkpoint: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "merged[v2]", MergeOptions(dtype="bfloat16", verify="weights", force=True)
    check_stage(
        output,
        lambda: merge(checkpoint, output, WEIGHTS_ONLY),
        lambda: merge(checkpoint, output, other),
        lambda: merge(checkpoint, output, MergeOptions(verify="weights", force=True)),
    )


def test_values_beyond_float16(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", lora_alpha=10_000_000)
    refuses(adapter, tmp_path / "merged", "wider --dtype", MergeOptions(dtype="float16", verify="weights"))


def test_full_disk(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk", "128k") as disk:
        refuses(checkpoint, disk / "merged", "are free; make room")
        code = (
            "import sys; from pathlib import Path; import trsr_dist.merge.inputs as g; g.SPARE_BYTES = -2**40\n"
            "from trsr_dist.merge.inputs import MergeOptions; from trsr_dist.merge.job import merge\n"
            "from trsr_dist.cli import run_command\n"
            "run_command(lambda: merge(Path(sys.argv[1]), Path(sys.argv[2]), MergeOptions(verify='weights')))"
        )
        command = [sys.executable, "-c", code, str(checkpoint), str(disk / "merged")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and FULL in done.stderr
        assert list(disk.iterdir()) == []
