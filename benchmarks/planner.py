"""The planner against what it predicts: time and memory of other models, and evenness on many ranks.

Calibrated on a step of one model (its FLOP/s, measured in turns with the others'; what the process holds beyond the
planned), it predicts those of others: steps of training, and rows of scoring.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import Row, in_child, peak_bytes
from benchmarks.data_plane import simulations
from benchmarks.ways import (
    ANSWERS,
    LORA_RANK,
    TARGETS,
    Measured,
    Way,
    make_user,
    measure,
    row_work,
    suffix_lengths,
)
from trsr_dist.config.sections import LoraSection
from trsr_dist.model.adapters import add_lora
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.planner.flops import forward_flops, training_flops
from trsr_dist.planner.memory import BYTES, StepSettings, ZeroSetting, forward_bytes, rank_memory
from trsr_dist.planner.shape import ModelShape
from trsr_dist.rows import PackedRow, pack_row


def sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> dict[str, int]:
    """A Llama config's sizes."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dict(zip(names, (hidden, layers, heads, kv_heads, inner), strict=True)) | {"vocab_size": vocabulary}


@dataclass(frozen=True, slots=True)
class Trial:
    """A model, and a row of users."""

    name: str
    sizes: dict[str, int]
    num_users: int
    prefix: int
    suffix: int
    num_candidates: int

    def scaled(self, scale: float) -> Trial:
        """With fewer users."""
        return replace(self, num_users=max(1, round(self.num_users * min(1.0, scale))))

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_config(self.sizes)

    @property
    def num_lora(self) -> int:
        return self.shape.num_lora_parameters(LORA_RANK, TARGETS)

    def row(self) -> PackedRow:
        names = [f"user {number}" for number in range(self.num_users)]
        return pack_row(
            [make_user(n, self.prefix, suffix_lengths(n, self.suffix, self.num_candidates), 60) for n in names]
        )


CALIBRATED = Trial("640 x 5 layers", sizes(640, 5, 10, 10, 1728, 16384), 4, 512, 48, 5)
"""In the middle of the widths: the wider a model, the larger the share of its time in matrix products."""
PREDICTED = (
    Trial("384 x 8 layers", sizes(384, 8, 6, 6, 1024, 4096), 4, 512, 48, 5),
    Trial("1024 x 3 layers, 1+1", sizes(1024, 3, 16, 4, 2816, 2048), 5, 300, 32, 2),
    Trial("512 x 4 layers, 1+20", sizes(512, 4, 8, 2, 1408, 2048), 2, 700, 32, 21),
)
PRECISION = "float32"
REPEATS = 3
MMAP_THRESHOLD = -3
PAGES = 65536
"""Bytes from which on malloc hands memory back at once."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is predicted of a trial, and how it is run."""

    name: str
    prepare: Callable[[Trial], Way]
    planned_bytes: Callable[[Trial], int]


def run(scale: float) -> list[Row]:
    """All predictions; ``scale`` multiplies the users of the rows that are timed, and those of the simulation."""
    return [row for kind in KINDS for row in predictions(kind, scale)] + simulations(scale)


def predictions(kind: Kind, scale: float) -> list[Row]:
    """Predicted over measured."""
    rest = in_child(step_bytes, kind.prepare, CALIBRATED) - kind.planned_bytes(CALIBRATED)
    case = f"{kind.name}, calibrated on {CALIBRATED.name}"
    rows = [Row("planner", case, "beyond the planned", rest / 1e6, "MB", "interpreter and libraries")]
    for trial in PREDICTED:
        rows += [_seconds_row(kind, trial, scale), *_memory_rows(kind, trial, rest)]
    return rows


def _seconds_row(kind: Kind, trial: Trial, scale: float) -> Row:
    known, found = in_child(step_seconds, kind.prepare, CALIBRATED.scaled(scale), trial.scaled(scale))
    rates = [known.flops / seconds for seconds in known.times]
    ratios = [found.flops / rate / seconds for rate, seconds in zip(rates, found.times, strict=True)]
    note = f"{median(found.times):.2f} measured; calibrated: {median(rates) / 1e9:.1f} GFLOP/CPU-s"
    what = "CPU seconds, predicted / measured"
    case = f"{kind.name}, {trial.name}"
    return Row("planner", case, what, median(ratios), "x", note, min(ratios), max(ratios))


def _memory_rows(kind: Kind, trial: Trial, rest: int) -> list[Row]:
    held, planned = in_child(step_bytes, kind.prepare, trial), kind.planned_bytes(trial)
    expected, case = planned + rest, f"{kind.name}, {trial.name}"
    note = f"{expected / 1e6:.0f} MB predicted, {held / 1e6:.0f} measured, {rest / 1e6:.0f} of them calibrated"
    return [
        Row("planner", case, "peak memory, predicted / measured", expected / held, "x", note),
        Row("planner", case, "the same without the libraries' share", planned / (held - rest), "x"),
    ]


def step_seconds(prepare: Callable[[Trial], Way], *trials: Trial) -> list[Measured]:
    """CPU seconds of steps, in turns: the cores' speed changes with what else they do."""
    return measure([prepare(trial) for trial in trials], REPEATS)


def step_bytes(prepare: Callable[[Trial], Way], trial: Trial) -> int:
    """Peak memory of this process, without what malloc keeps for later: on a GPU, that is the allocator's to give."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, PAGES)
    prepare(trial).step()
    return peak_bytes()


def training(trial: Trial) -> Way:
    """Forward and backward."""
    model, row = make_model(trial).train(), trial.row()

    def step() -> None:
        inputs = RowInputs(row, torch.device("cpu"))
        cross_entropy(model(inputs, "logits"), min(ANSWERS) + inputs.labels).backward()

    flops = training_flops(trial.shape, row_work(row), trial.num_lora, answer_pairs=row.num_separate_tokens)
    return Way(trial.name, step, 1.0, flops)


def training_bytes(trial: Trial) -> int:
    """Weights, adapter, gradients and activations; there is no optimizer in the trial."""
    step = StepSettings(trial.row().num_tokens, PRECISION, False, TARGETS, answers_only=True, dropout=False)
    memory = rank_memory(trial.shape, trial.num_lora, step, ZeroSetting(0), world_size=1)
    return memory.device - memory.optimizer


def scoring(trial: Trial) -> Way:
    """Forward alone."""
    model, row = make_model(trial).eval(), trial.row()

    @torch.no_grad()
    def step() -> None:
        model(RowInputs(row, torch.device("cpu")), "pair").sum().item()

    flops = forward_flops(trial.shape, row_work(row), trial.num_lora, answer_pairs=row.num_separate_tokens)
    return Way(trial.name, step, 1.0, flops)


def scoring_bytes(trial: Trial) -> int:
    """Weights, adapter and the activations of the widest place."""
    weights = (trial.shape.num_parameters + trial.num_lora) * BYTES[PRECISION]
    return weights + forward_bytes(trial.shape, trial.row().num_tokens, BYTES[PRECISION])


def make_model(trial: Trial) -> Recommender:
    """In float32, with LoRA layers."""
    torch.set_num_threads(1)
    causal = AutoModelForCausalLM.from_config(LlamaConfig(**trial.sizes, max_position_embeddings=4096))
    add_lora(causal, 0, **LoraSection(r=LORA_RANK, dropout=0.0, target_modules=TARGETS).model_dump())
    return Recommender(causal, ANSWERS, "cpu")


KINDS = (Kind("training", training, training_bytes), Kind("scoring", scoring, scoring_bytes))
