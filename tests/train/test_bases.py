"""Every ZeRO stage trains the same base, and none starts from one that holds an adapter, or from an adapter that does
not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.merge.models import make_adapter
from tests.model.test_ties import store
from tests.spawn import run_ranks
from tests.train.world import link_run, losses_of, make_run, start

STAGES = (1, 3)


def train_all(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    found = {}
    for stage in STAGES:
        zero = {"deepspeed_config": str(folder / f"zero{stage}.json")}
        found[f"stage{stage}"] = start(folder / f"stage{stage}", train=zero | {"loss": "full_text"})
        adapted = {"name_or_path": str(folder / "adapted")}
        found[f"adapted{stage}"] = start(folder / "new", train=zero, model=adapted)
    found["misnamed"] = start(folder / "new", train={"init_adapter": str(folder / "misnamed")})
    return found


def test_stages_train_the_same_base_and_refuse_the_same(tmp_path: Path) -> None:
    """Its config says that the head is tied, its files hold another head."""
    source = make_run(tmp_path / "source", num_users=40)
    base = store(source / "base", lambda tensors: None, tied=True)
    for name in ("stage1", "stage3", "new"):
        link_run(tmp_path / name, source)
    for stage in STAGES:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        (tmp_path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    misnamed = make_adapter(base, tmp_path / "misnamed")
    shutil.copytree(base, tmp_path / "adapted")
    shutil.copytree(misnamed, tmp_path / "adapted", dirs_exist_ok=True)
    path = misnamed / "adapter_model.safetensors"
    save_file({name.replace("self_attn", "attn"): t for name, t in load_file(path).items()}, path)
    found = run_ranks(train_all, 1, tmp_path)[0]
    assert (found["stage1"], found["stage3"]) == ("0", "0")
    first, third = (losses_of(tmp_path / f"stage{stage}") for stage in STAGES)
    assert first.keys() == {1, 2} and third == pytest.approx(first, rel=1e-5)
    for stage in STAGES:
        assert "adapted: holds adapter_config.json" in found[f"adapted{stage}"]
    assert "16 tensors do not fit the base" in found["misnamed"]
