"""The planner against what it predicts: time and memory of other models, and evenness on many ranks.

Calibrated on the training step of one model (its FLOP/s, what the process holds beyond the planned), it predicts
those of others. The data plane is simulated for up to 1,024 ranks with the stream's own packing and dealing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from trsr_dist.benchmarks.common import Row, in_child, peak_bytes
from trsr_dist.benchmarks.mixes import AMAZON, MIND, Mix
from trsr_dist.benchmarks.ways import ANSWERS, LORA_RANK, TARGETS, Way, make_user, measure, row_work, suffix_lengths
from trsr_dist.forecast.simulation import Loads, divide, epoch_rows, run_with_failures
from trsr_dist.hashing import random_stream
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.lora import add_lora
from trsr_dist.model.recommender import Recommender
from trsr_dist.planning.flops import training_flops
from trsr_dist.planning.memory import KeptActivations, ZeroSetting, rank_memory
from trsr_dist.planning.restarts import Restarts, best_interval
from trsr_dist.planning.shape import ModelShape
from trsr_dist.rows import PackedRow, pack_row
from trsr_dist.shards.lengths import Table
from trsr_dist.shards.plan import WINDOW_SAMPLES, WindowPlan


def sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> dict[str, int]:
    """A Llama config's sizes."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dict(zip(names, (hidden, layers, heads, kv_heads, inner), strict=True)) | {"vocab_size": vocabulary}


@dataclass(frozen=True, slots=True)
class Trial:
    """A training step: a model, and a row of users."""

    name: str
    sizes: dict[str, int]
    num_users: int
    prefix: int
    suffix: int
    num_candidates: int

    def row(self) -> PackedRow:
        names = [f"user {number}" for number in range(self.num_users)]
        return pack_row(
            [make_user(n, self.prefix, suffix_lengths(n, self.suffix, self.num_candidates), 60) for n in names]
        )


CALIBRATED = Trial("512 x 4 layers", sizes(512, 4, 8, 2, 1408, 2048), 4, 512, 48, 5)
PREDICTED = (
    Trial("384 x 8 layers", sizes(384, 8, 6, 6, 1024, 4096), 4, 512, 48, 5),
    Trial("1024 x 3 layers, 1+1", sizes(1024, 3, 16, 4, 2816, 2048), 5, 300, 32, 2),
    Trial("640 x 5 layers, 1+20", sizes(640, 5, 10, 10, 1728, 16384), 2, 700, 32, 21),
)
REPEATS = 2
MMAP_THRESHOLD = -3
PAGES = 65536
"""Bytes from which on malloc hands memory back at once."""
NUM_USERS = 200_000
ROW_TOKENS, ROWS_PER_STEP, NUM_CANDIDATES = 8192, 2048, 5
RANKS = (8, 64, 256, 1024)
JITTER = 0.05
SAVE, RESTART, DEVICE_DAYS = 10.0, 300.0, 2000.0
"""Seconds of a checkpoint and of a restart, and days between failures of one device: assumed, not measured."""
FAILURES = 2000
DAY = 86400.0


def run(scale: float) -> list[Row]:
    """All predictions; ``scale`` multiplies the users of the simulation."""
    rows = predictions()
    for mix in (MIND, AMAZON):
        rows += data_plane(mix, max(40_000, round(NUM_USERS * scale)))
    return rows + failures()


def predictions() -> list[Row]:
    """Predicted over measured."""
    rate = flops(CALIBRATED) / in_child(step_seconds, CALIBRATED)
    held = in_child(step_bytes, CALIBRATED)
    rest = held - planned_bytes(CALIBRATED)
    rows = [
        Row("planner", f"calibrated on {CALIBRATED.name}", "rate", rate / 1e9, "GFLOP/CPU-s"),
        Row(
            "planner",
            f"calibrated on {CALIBRATED.name}",
            "beyond the planned",
            rest / 1e6,
            "MB",
            "interpreter and libraries",
        ),
    ]
    for trial in PREDICTED:
        seconds, predicted = in_child(step_seconds, trial), flops(trial) / rate
        note = f"{predicted:.2f} predicted, {seconds:.2f} measured"
        rows.append(
            Row("planner", trial.name, "CPU seconds of a step, predicted / measured", predicted / seconds, "x", note)
        )
        held, predicted = in_child(step_bytes, trial), planned_bytes(trial) + rest
        note = f"{predicted / 1e6:.0f} MB predicted, {held / 1e6:.0f} measured, {rest / 1e6:.0f} of them calibrated"
        rows.append(Row("planner", trial.name, "peak memory, predicted / measured", predicted / held, "x", note))
        planned = planned_bytes(trial)
        rows.append(Row("planner", trial.name, "the same without the libraries' share", planned / (held - rest), "x"))
    return rows


def flops(trial: Trial) -> float:
    """Counted operations of a step."""
    shape, row = ModelShape.from_config(trial.sizes), trial.row()
    lora = shape.num_lora_parameters(LORA_RANK, TARGETS)
    return training_flops(shape, row_work(row), lora, answer_pairs=row.num_separate_tokens)


def planned_bytes(trial: Trial) -> int:
    """Weights, adapter, gradients and activations; there is no optimizer in the trial."""
    shape = ModelShape.from_config(trial.sizes)
    lora = shape.num_lora_parameters(LORA_RANK, TARGETS)
    kept = KeptActivations(recompute=False, target_modules=TARGETS)
    memory = rank_memory(shape, lora, trial.row().num_tokens, 1, ZeroSetting(0), "float32", kept)
    return memory.device - memory.optimizer


def step_seconds(trial: Trial) -> float:
    """CPU seconds, the least of some repetitions."""
    return min(measure([prepare(trial)], REPEATS)[0].times)


def step_bytes(trial: Trial) -> int:
    """Peak memory of this process, without what malloc keeps for later: on a GPU, that is the allocator's to give."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, PAGES)
    prepare(trial).step()
    return peak_bytes()


def prepare(trial: Trial) -> Way:
    """A step in float32, forward and backward."""
    torch.set_num_threads(1)
    causal = AutoModelForCausalLM.from_config(LlamaConfig(**trial.sizes, max_position_embeddings=4096))
    add_lora(causal, LORA_RANK, 16, 0.0, TARGETS, False, 0)
    model, row = Recommender(causal, ANSWERS, "cpu").train(), trial.row()

    def step() -> None:
        inputs = RowInputs(row, torch.device("cpu"))
        cross_entropy(model(inputs, "logits"), min(ANSWERS) + inputs.labels).backward()

    return Way(trial.name, step, 1.0, flops(trial))


def data_plane(mix: Mix, num_users: int) -> list[Row]:
    """An epoch of users with a data set's lengths on ever more ranks."""
    rows = epoch_rows(mix_windows(mix, num_users, NUM_CANDIDATES, ROW_TOKENS), mix.head)
    fill = rows.tokens.mean() / ROW_TOKENS
    case = f"{num_users:,} users of {mix.name}'s lengths, {len(rows.costs)} rows of {ROW_TOKENS}"
    found = [Row("planner", case, "row fill", fill, "share")]
    for world_size in RANKS:
        loads = divide(rows, ROWS_PER_STEP, world_size)
        whole = Loads(loads.costs[:-1], loads.tokens[:-1])
        case = f"{mix.name}, {world_size} ranks, {len(loads.costs)} steps of {ROWS_PER_STEP} rows"
        note = f"{whole.slowest:.4f} without the last step, which is not full"
        jitter = f"the same, rank speeds vary by {JITTER:.0%} from step to step"
        found += [
            Row("planner", case, "time over evenly divided", loads.slowest, "x", note),
            Row("planner", case, jitter, whole.straggling(JITTER, 0), "x", "without the last step"),
            Row("planner", case, "tokens of the fullest rank over the mean", whole.most_tokens, "x"),
        ]
    return found


def mix_windows(mix: Mix, num_users: int, num_candidates: int, row_tokens: int) -> Iterator[WindowPlan]:
    """Rows of users with a data set's lengths, window by window, as the stream plans them."""
    draw = np.random.default_rng(0)
    for first in range(0, num_users, WINDOW_SAMPLES):
        samples = np.arange(first, min(num_users, first + WINDOW_SAMPLES))
        size = len(samples)
        table = Table(
            samples=samples,
            prefixes=draw.choice(mix.prefixes, size),
            trimmed=np.zeros(size, dtype=bool),
            starts=np.arange(size + 1) * num_candidates,
            suffixes=draw.choice(mix.suffixes, size * num_candidates),
            labels=np.arange(size * num_candidates) % num_candidates == 0,
        )
        yield WindowPlan(table, np.ones(len(table.suffixes), dtype=bool), row_tokens, first, mix.head)


def failures() -> list[Row]:
    """What failing devices cost a job that saves as often as is best."""
    rows = []
    for ranks in RANKS:
        between = DEVICE_DAYS * DAY / ranks
        plan = Restarts(SAVE, best_interval(SAVE, between), RESTART, between)
        work = FAILURES * between
        found = run_with_failures(work, plan, random_stream("failures", ranks)) / work - 1
        case = f"{ranks} devices, one failure each in {DEVICE_DAYS:.0f} days"
        note = f"formula {plan.overhead:.3%}; a checkpoint every {plan.interval / 60:.0f} minutes"
        rows.append(Row("planner", case, "time lost", 100 * found, "%", note))
    return rows
