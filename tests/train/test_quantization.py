"""QLoRA on bitsandbytes' CPU kernels, FP8 on PyTorch's: losses stay near, the adapter fits the whole base."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.spawn import run_script
from tests.train.world import link_run, losses_of, make_config, write_config
from trsr_dist.environment import Ranks
from trsr_dist.errors import ConfigError
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.model.loading import load_base, open_model
from trsr_dist.pretrained import BaseSource
from trsr_dist.run import RunFolder
from trsr_dist.train.model import set_up_model

pytest.importorskip("bitsandbytes")
STEPS = 6
LAYERS = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}


def train(run: Path, source: Path, kind: str) -> dict[int, float]:
    link_run(run, source)
    model = {"name_or_path": "RUN/base", "quantization": kind}
    config = write_config(run, model=model, train={"max_steps": STEPS, "precision": "bfloat16"})
    done = run_script("launch/train.py", "--config", config)
    assert done.returncode == 0, done.stderr
    return losses_of(run)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return train(tmp_path_factory.mktemp("whole") / "run", source, "none")


@pytest.mark.parametrize(("kind", "near"), [("4bit", 0.1), ("8bit", 0.02), ("fp8", 0.05)])
def test_losses_stay_near_and_the_adapter_merges(
    source: Path,
    whole: dict[int, float],
    tmp_path: Path,
    kind: str,
    near: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    quantized = train(tmp_path / kind, source, kind)
    assert quantized != whole and sorted(quantized) == list(range(1, STEPS + 1))
    assert quantized == pytest.approx(whole, rel=near)
    with caplog.at_level("INFO", "trsr"):
        open_model(str(tmp_path / kind / "checkpoints" / "latest"), "cpu", torch.float32, {})
    assert f"trained with model.quantization={kind}; scored on the whole base" in caplog.text
    merge(tmp_path / kind / "checkpoints" / f"step-{STEPS:06d}", tmp_path / "merged", MergeOptions(verify="weights"))
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_base_is_quantized(source: Path, kind: str) -> None:
    base = load_base(BaseSource(str(source / "base"), quantization=kind), torch.bfloat16, torch.device("cpu"))
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == LAYERS[kind]
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("kind", [*LAYERS, "fp8"])
def test_divided_weights_cannot_be_quantized(source: Path, tmp_path: Path, kind: str) -> None:
    run = link_run(tmp_path / "run", source)
    model = {"name_or_path": "RUN/base", "quantization": kind}
    config = make_config(run, model=model, train={"deepspeed_config": "ds_configs/zero3.json"})
    with pytest.raises(ConfigError, match=f"model.quantization={kind} and ZeRO stage 3 exclude each other"):
        set_up_model(config, RunFolder(run), Ranks(0, 1, 0, 1))


def test_without_bitsandbytes_its_name_is_said(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="model.quantization=4bit: bitsandbytes is not installed"):
        load_base(BaseSource(str(source / "base"), quantization="4bit"), torch.bfloat16, torch.device("cpu"))
