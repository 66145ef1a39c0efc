"""DeepSpeed on one GPU with NCCL: every stage against a plain loop, and checkpoints between CPU and GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_equal_losses import STAGES
from tests.train.world import NUM_STEPS, link_run, losses_of, make_config, make_run, plain_losses

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def plain(source: Path) -> list[float]:
    return plain_losses(make_config(source))


def train(run: Path, on_gpu: bool = True, **settings: object) -> dict[int, float]:
    make_config(run, train=settings)
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | hidden
    command = [sys.executable, "launch/train.py", "--config", str(run / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses_of(run)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_bfloat16_losses_stay_near_the_plain_loop(source: Path, plain: list[float], name: str, tmp_path: Path) -> None:
    run = link_run(tmp_path / "run", source)
    (run / "ds.json").write_text(json.dumps({"zero_optimization": STAGES[name]}))
    losses = train(run, precision="bfloat16", deepspeed_config=str(run / "ds.json"))
    assert [losses[step] for step in range(1, NUM_STEPS + 1)] == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("first_on_gpu", [True, False])
def test_a_checkpoint_goes_on_on_the_other_device(
    source: Path, plain: list, first_on_gpu: bool, tmp_path: Path
) -> None:
    first = link_run(tmp_path / "first", source)
    train(first, first_on_gpu, save_every_steps=8, keep_checkpoints=9)
    second = link_run(tmp_path / "second", source)
    shutil.copytree(first / "checkpoints" / "step-000008", second / "checkpoints" / "step-000008")
    losses = train(second, not first_on_gpu)
    assert [losses[step] for step in range(9, NUM_STEPS + 1)] == pytest.approx(plain[8:], abs=1e-3)
