"""DeepSpeed's own checkpoints, every ZeRO stage, one to four real ranks."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from tests.merge.engine_ranks import train_stages
from tests.merge.models import load, make_base, random_peft_model
from tests.model.test_adapters import Planted
from tests.spawn import run_ranks
from trsr_dist.errors import CheckpointError
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.merge.source import find_source, peft_name
from trsr_dist.model.adapters import read_adapter


@pytest.fixture(scope="module", params=[1, 2, 4])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and one engine checkpoint a ZeRO stage, trained by this number of ranks."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    run_ranks(train_stages, request.param, make_base(folder / "base"), folder / "out")
    return folder


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_merges_to_the_trained_weights(trained: Path, stage: int, tmp_path: Path) -> None:
    folder = trained / "out" / f"zero{stage}"
    truth = load_file(folder / "truth.safetensors")
    adapter = find_source(folder).read()
    assert len(adapter.tensors) == len(truth) == 17
    for name, tensor in truth.items():
        assert torch.equal(adapter.tensors[peft_name(name).removeprefix("base_model.model.")], tensor), name
    options = MergeOptions(base=str(trained / "base"), verify="scores")
    merge(folder / "global_step2", tmp_path / "merged", options)
    model = peft_model(trained / "base")
    model.load_state_dict(truth, strict=False)
    expected = model.merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "merged").state_dict().items():
        assert (tensor - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def peft_model(base: Path) -> PeftModel:
    return random_peft_model(base, modules_to_save=["lm_head"], rank_pattern={"q_proj": 3})


def test_adapter_only_gives_what_peft_loads(trained: Path, tmp_path: Path) -> None:
    base, folder = trained / "base", trained / "out" / "zero3"
    merge(folder, tmp_path / "adapter", MergeOptions(base=str(base), adapter_only=True))
    found = dict(PeftModel.from_pretrained(load(base), tmp_path / "adapter").named_parameters())
    truth = load_file(folder / "truth.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    assert read_adapter(tmp_path / "adapter").config.base_model_name_or_path == str(base)


def test_damaged_checkpoints(trained: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(trained / "out" / "zero2", cut)
    part = sorted((cut / "global_step2").glob("*_optim_states.pt"))[-1]
    os.truncate(part, part.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        find_source(cut).read()
    (cut / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="does not record the LoRA settings"):
        find_source(cut).read()


def test_a_lost_rank_is_noticed(trained: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(trained / "out" / "zero3", lost)
    sorted((lost / "global_step2").glob("*_optim_states.pt"))[-1].unlink()
    with pytest.raises(CheckpointError, match="missing or damaged|is incomplete"):
        find_source(lost).read()


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_code_in_a_checkpoint_is_not_run(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "global_step2"
    folder.mkdir()
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    states = {"module": {}, "buffer_names": [], "param_shapes": [], "shared_params": {}, "ds_version": "0"}
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    torch.save({"module": Planted(tmp_path / "mark"), "optimizer_state_dict": {}}, folder / name)
    with pytest.raises(CheckpointError, match="it holds code, which is not run"):
        find_source(folder).read()
    assert not (tmp_path / "mark").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
