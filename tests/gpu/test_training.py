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
NAMES = ("zero1", "zero2", "zero3", "zero3_offload")
SAVED = "step-000008"
DEVICES = ("gpu", "cpu")
QUANTIZED = {"4bit": 0.1, "8bit": 0.05, "fp8": 0.05}
"""How near their losses stay."""
TRAIN = """
import sys
from trsr_dist.environment import detect_ranks, prepare_process
prepare_process(num_threads=4)
from trsr_dist.config import load_config
from trsr_dist.distributed import process_group
from trsr_dist.train.job import train
with process_group(detect_ranks(), 120, always=True):
    for run in sys.argv[1:]:
        assert train(load_config(run + "/config.yaml")) == 0
"""
"""Importing takes longer than training: one process makes all runs of a device."""


def start(device: str, runs: list[Path]) -> subprocess.Popen[str]:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | hidden
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, *map(str, runs)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_beside(runs: dict[str, list[Path]]) -> None:
    """Both devices' runs at once."""
    processes = [start(device, folders) for device, folders in runs.items()]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=140)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def plain(source: Path) -> list[float]:
    return plain_losses(make_config(source))


@pytest.fixture(scope="module")
def first(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each stage in bfloat16 on the GPU, and on each device one in float32 with checkpoints."""
    folder = tmp_path_factory.mktemp("first")
    for name in NAMES:
        run = link_run(folder / name, source)
        (run / "ds.json").write_text(json.dumps({"zero_optimization": STAGES[name]}))
        make_config(run, train={"precision": "bfloat16", "deepspeed_config": str(run / "ds.json")})
    for device in DEVICES:
        make_config(link_run(folder / device, source), train={"save_every_steps": 8, "keep_checkpoints": 9})
    train_beside({"gpu": [folder / name for name in (*NAMES, "gpu")], "cpu": [folder / "cpu"]})
    return folder


@pytest.fixture(scope="module")
def second(first: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each device goes on with the other's checkpoint."""
    folder = tmp_path_factory.mktemp("second")
    for device, other in zip(DEVICES, reversed(DEVICES), strict=True):
        run = link_run(folder / device, source)
        shutil.copytree(first / other / "checkpoints" / SAVED, run / "checkpoints" / SAVED)
        make_config(run)
    train_beside({device: [folder / device] for device in DEVICES})
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on each quantized base, in bfloat16."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("quantized")
    for kind in QUANTIZED:
        model = {"name_or_path": "RUN/base", "quantization": kind}
        make_config(link_run(folder / kind, source), model=model, train={"precision": "bfloat16"})
    train_beside({"gpu": [folder / kind for kind in QUANTIZED]})
    return folder


@pytest.mark.parametrize("kind", QUANTIZED)
def test_losses_on_a_quantized_base_stay_near(quantized: Path, plain: list[float], kind: str) -> None:
    losses = losses_of(quantized / kind)
    found = [losses[step] for step in range(1, NUM_STEPS + 1)]
    assert found == pytest.approx(plain, rel=QUANTIZED[kind]) and found != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_losses_stay_near_the_plain_loop(first: Path, plain: list[float], name: str) -> None:
    losses = losses_of(first / name)
    assert [losses[step] for step in range(1, NUM_STEPS + 1)] == pytest.approx(plain, rel=2e-2)


def test_float32_losses_are_those_of_the_plain_loop(first: Path, plain: list[float]) -> None:
    losses = losses_of(first / "gpu")
    assert [losses[step] for step in range(1, NUM_STEPS + 1)] == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_goes_on_on_the_other_device(second: Path, plain: list[float], device: str) -> None:
    losses = losses_of(second / device)
    assert min(losses) == 9
    assert [losses[step] for step in range(9, NUM_STEPS + 1)] == pytest.approx(plain[8:], abs=1e-3)
