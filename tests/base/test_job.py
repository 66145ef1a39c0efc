"""The base as a command makes it: whole, repeatable, ready for the other stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.disks import closed_to_others
from trsr_dist.base.job import make_base
from trsr_dist.config import Config, load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.errors import RunError
from trsr_dist.files import sha256_of
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.summarize.job import summarize

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = [
    "demo.num_users=60", "base.hidden_size=32", "base.intermediate_size=64", "base.num_layers=2", "base.num_heads=2",
    "base.num_kv_heads=1", "base.vocab_size=700", "base.steps=30",
]  # fmt: skip


def config_of(run: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [f"run.dir={run}", *SMALL, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = config_of(folder)
    prepare(config)
    summarize(config)
    make_base(config)
    return folder


def facts_of(run: Path) -> dict:
    return json.loads((run / "base" / "manifest.json").read_text())


def test_the_other_stages_can_read_it(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "base")
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    builder = PromptBuilder(tokenizer, **config_of(run).prompt.model_dump())
    assert len(set(builder.answer_ids)) == 2
    assert model.config.vocab_size == len(tokenizer) <= 700
    assert model.num_parameters() == facts_of(run)["num_parameters"]
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_it_has_learned(run: Path) -> None:
    """Far below the loss of a guess among all tokens, log(700) = 6.6."""
    assert facts_of(run)["loss"] < 5.0


def test_a_second_run_does_nothing_and_force_gives_the_same_bytes(run: Path) -> None:
    weights = run / "base" / "model.safetensors"
    before, made = sha256_of(weights), weights.stat().st_mtime_ns
    make_base(config_of(run))
    assert weights.stat().st_mtime_ns == made
    make_base(config_of(run), force=True)
    assert weights.stat().st_mtime_ns != made
    assert sha256_of(weights) == before


def test_what_is_done_writes_its_config_where_it_is_missing(run: Path) -> None:
    config, folder = config_of(run), run / "config"
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert before.keys() == {"prepare.yaml", "summarize.yaml", "base.yaml"}
    for path in folder.iterdir():
        path.unlink()
    prepare(config), summarize(config), make_base(config)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_colleagues_may_read_all_of_it(run: Path) -> None:
    assert closed_to_others(run.rglob("*")) == []


def test_other_settings_need_force(run: Path) -> None:
    with pytest.raises(RunError, match="steps"):
        make_base(config_of(run, "base.steps=31"))


def test_a_dry_run_writes_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("histories", "shards"):
        (tmp_path / name).symlink_to(run / name)
    make_base(config_of(tmp_path), dry_run=True)
    assert f"write {tmp_path / 'base'}" in capsys.readouterr().out
    assert not (tmp_path / "base").exists()


def test_without_shards(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=str(tmp_path)):
        make_base(config_of(tmp_path))
    assert not (tmp_path / "base").exists()
