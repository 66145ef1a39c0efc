"""DeepSpeed's own checkpoints, every ZeRO stage, one to four real ranks."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.merge.models import load, make_base, random_peft_model
from trsr_dist.errors import CheckpointError
from trsr_dist.merge.adapter import read_adapter
from trsr_dist.merge.engine_checkpoint import peft_name
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.merge.source import find_source

ROOT = Path(__file__).parents[2]
SECONDS = 240


def run_ranks(base: Path, output: Path, world_size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, "-m", "tests.merge.engine_ranks", str(base), str(output)]
        with open(output.with_name(f"rank{rank}.log"), "w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world_size, output.with_name("rank0.log").read_text()[-3000:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_stage_merges_to_the_trained_weights(world_size: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    run_ranks(base, tmp_path / "out", world_size)
    for stage in range(4):
        folder = tmp_path / "out" / f"zero{stage}"
        truth = load_file(folder / "truth.safetensors")
        adapter = find_source(folder).read()
        assert len(adapter.tensors) == len(truth) == 17
        for name, tensor in truth.items():
            assert torch.equal(adapter.tensors[peft_name(name).removeprefix("base_model.model.")], tensor), name
        options = MergeOptions(base=str(base), verify="scores")
        merge(folder / "global_step2", tmp_path / f"merged{stage}", options)
        assert_trained(tmp_path / f"merged{stage}", base, truth)
    refuse_damaged(tmp_path / "out" / "zero2", tmp_path)


def assert_trained(merged: Path, base: Path, truth: dict[str, torch.Tensor]) -> None:
    model = random_peft_model(base, modules_to_save=["lm_head"], rank_pattern={"q_proj": 3})
    model.load_state_dict(truth, strict=False)
    expected = model.merge_and_unload().state_dict()
    for name, tensor in load(merged).state_dict().items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def refuse_damaged(folder: Path, tmp_path: Path) -> None:
    """A rank's file cut short, no LoRA settings: clear errors."""
    shutil.copytree(folder, tmp_path / "cut")
    part = sorted((tmp_path / "cut" / "global_step2").glob("*_optim_states.pt"))[-1]
    os.truncate(part, part.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        find_source(tmp_path / "cut").read()
    part.unlink()
    if len(list(part.parent.glob("*_optim_states.pt"))):
        with pytest.raises(CheckpointError, match="missing or damaged"):
            find_source(tmp_path / "cut").read()
    (tmp_path / "cut" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="does not record the LoRA settings"):
        find_source(tmp_path / "cut").read()


def test_adapter_only_gives_what_peft_loads(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    run_ranks(base, tmp_path / "out", 1)
    folder = tmp_path / "out" / "zero2"
    merge(folder, tmp_path / "adapter", MergeOptions(base=str(base), adapter_only=True))
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    truth = load_file(folder / "truth.safetensors")
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    assert read_adapter(tmp_path / "adapter").config.base_model_name_or_path == str(base)
