"""A small run folder to train in, and a plain PyTorch loop to compare with."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, inject_adapter_in_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.merge.models import make_base
from tests.shards.world import make_sample, write_split
from tests.tokenizers import byte_level
from trsr_dist.config import Config, load_config
from trsr_dist.errors import TrsrError
from trsr_dist.files import atomic_file
from trsr_dist.metric_log import read_metrics
from trsr_dist.model.inputs import separate_prompts
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.stream import TrainStream
from trsr_dist.train.prepare import packing_settings
from trsr_dist.train.step import learning_rate

NUM_STEPS = 20
FEW_STEPS = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"format": "demo"},
    "prompt": {"max_tokens": 300, "style": "plain"},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
    "train": {
        "learning_rate": 5e-3,
        "negatives_per_positive": 2,
        "max_steps": NUM_STEPS,
        "row_tokens": 700,
        "rows_per_step": 4,
        "num_workers": 0,
        "log_every_steps": 1,
        "save_every_steps": 1000,
        "precision": "float32",
        "max_grad_norm": 0.5,
        "timeout_seconds": 120,
    },
}


def make_run(folder: Path, num_users: int = 120, kind: str = "llama") -> Path:
    """A run folder with train and validation shards and a base."""
    make_base(folder / "base", kind)
    write_split(folder / "shards" / "train", [make_sample(i) for i in range(num_users)], [num_users // 2] * 2)
    write_split(folder / "shards" / "valid", [make_sample(1000 + i) for i in range(30)], [30], "valid")
    return folder


def link_run(folder: Path, source: Path) -> Path:
    """A run folder that shares base and shards with another."""
    folder.mkdir(parents=True)
    for name in ("base", "shards"):
        (folder / name).symlink_to(source / name)
    return folder


def write_config(run: Path, /, **changes: dict[str, Any]) -> Path:
    """The config file of a run; changes go into the sections."""
    sections = {"run": {"dir": str(run), "tensorboard": False}, "model": {"name_or_path": "RUN/base"}} | SETTINGS
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    path = run / "config.yaml"
    with atomic_file(path) as stream:  # all ranks may write it
        yaml.safe_dump(sections, stream)
    return path


def make_config(run: Path, /, **changes: dict[str, Any]) -> Config:
    return load_config(write_config(run, **changes))


def start(run: Path, force: bool = False, /, **changes: dict[str, Any]) -> str:
    """Train for a few steps in this process; returns the exit status, or the error that a user would see."""
    from trsr_dist.train.job import train

    train_section = {"max_steps": FEW_STEPS} | changes.pop("train", {})
    try:
        return str(train(make_config(run, train=train_section, **changes), force))
    except TrsrError as error:
        return f"{type(error).__name__}: {error}"


def train_all(rank: int, world_size: int, runs: list[Path]) -> None:
    """One after the other, in one process group."""
    from trsr_dist.train.job import train

    for run in runs:
        assert train(load_config(run / "config.yaml")) == 0


def losses_of(run: Path) -> dict[int, float]:
    """Loss of every step that was logged; of one that was made twice the later."""
    return {row["step"]: row["train/loss"] for row in read_metrics(run) if "train/loss" in row}


def plain_losses(config: Config, num_steps: int = NUM_STEPS) -> list[float]:
    """Losses (answer or full_text) of a plain loop: one process, every prompt alone, nothing packed, no DeepSpeed."""
    run, train, lora = Path(config.run.dir), config.train, config.lora
    builder = PromptBuilder(byte_level(chat=True), **config.prompt.model_dump())
    model = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
    torch.manual_seed(config.run.seed)
    settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    inject_adapter_in_model(settings, model)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    adam = torch.optim.AdamW(trained, betas=train.adam_betas, weight_decay=train.weight_decay)
    stream = TrainStream(ShardSet(run / "shards" / "train"), builder, packing_settings(config))
    losses = []
    for number, step in enumerate(islice(stream, num_steps)):
        adam.zero_grad()
        total = 0.0
        for row in step.rows:
            for prompt, label in zip(separate_prompts(row), row.labels, strict=True):
                text = torch.tensor([*prompt, builder.answer_ids[0 if label else 1]])
                logits = model(input_ids=text[None, :-1]).logits[0]
                first = 0 if train.loss == "full_text" else len(prompt) - 1
                loss = cross_entropy(logits[first:], text[1 + first :]) / step.num_answers
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        rate = learning_rate(number, num_steps, train.learning_rate, train.warmup_ratio, train.schedule)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        losses.append(total)
    return losses
