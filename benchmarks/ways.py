"""What the suites of training and scoring share: a model's shape, users, ways to run them, and their times in turn."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from benchmarks.common import Row, rate_row, ratio_row, shared_workload, timed
from trsr_dist.planner.flops import Workload, triangle
from trsr_dist.planner.shape import ATTENTION_MODULES
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow

SHAPE = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 1408,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}
LORA_RANK = 8
TARGETS = ATTENTION_MODULES
PREFIXES = (256, 1024, 2048)
SUFFIXES = (32, 64)
ANSWERS = (3, 4)
INSTRUCTION = 60
"""Tokens that the users of a row share."""
REPEATS = 3
MEASURED = 2
"""Separate prompts that are run for a user; more cost as much each."""
BLOCKS = "benchmark_blocks"
MATRIX = 1024
MATRIX_REPEATS = 5
LEAST_SECONDS = 0.2
"""Of a measurement: CPU time is counted in ticks of about 10 ms."""

Step = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run some users."""

    name: str
    step: Step
    factor: float
    """Steps that the measured one stands for."""
    flops: float
    """Counted, of the whole."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A way's times."""

    name: str
    times: tuple[float, ...]
    """CPU seconds of the whole, by repetition."""
    flops: float


def measure(ways: Sequence[Way], repeats: int) -> list[Measured]:
    """CPU seconds, the ways in turn, after one step of each that is not counted."""
    loops = [_loops(way.step) for way in ways]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for seconds, way, number in zip(times, ways, loops, strict=True):
            with timed() as timer:
                for _ in range(number):
                    way.step()
            seconds.append(timer.cpu * way.factor / number)
    return [Measured(way.name, tuple(seconds), way.flops) for way, seconds in zip(ways, times, strict=True)]


def _loops(step: Step) -> int:
    """How often to run a step, after one that is not counted, so that the clock's ticks do not matter."""
    step()
    with timed() as timer:
        step()
    return max(1, math.ceil(LEAST_SECONDS / max(timer.cpu, LEAST_SECONDS / 100)))


def grid(scale: float) -> list[tuple[int, int]]:
    """Prefixes and longest suffixes; ``scale`` below 1 leaves out the longest prefixes, and the short suffixes."""
    suffixes = SUFFIXES if scale >= 1 else SUFFIXES[-1:]
    return [pair for pair in product(PREFIXES, suffixes) if pair[0] <= max(PREFIXES) * scale]


def users_row(suite: str, case: str, found: Measured, num_users: int, matrix_rate: float) -> Row:
    """Users a second; the bound is the rate of matrix products on the counted operations."""
    bound = num_users * matrix_rate / found.flops
    return rate_row(suite, case, found.name, num_users, found.times, "users/CPU-s", bound)


def against(suite: str, case: str, slow: Measured, fast: Measured, measure: str = "") -> Row:
    """How many times as long ``slow`` takes; the bound is the ratio of the counted operations."""
    measure = measure or f"{slow.name} / {fast.name}"
    return ratio_row(suite, case, measure, slow.times, fast.times, slow.flops / fast.flops)


def matrix_rate() -> float:
    """Float32 FLOP/s of a large matrix product on one thread: what any way can reach at best."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    found = measure([Way("product", lambda: torch.mm(a, b), 1.0, 2.0 * MATRIX**3)], MATRIX_REPEATS)[0]
    return found.flops / median(found.times)


def row_work(row: PackedRow) -> Workload:
    """Counts of a row, with what its users share counted once."""
    users = list(zip(row.prefix_lengths, row.suffix_lengths, strict=True))
    whole = sum((shared_workload(prefix, suffixes) for prefix, suffixes in users), Workload())
    copies = len(users) - 1
    return replace(
        whole,
        tokens=whole.tokens - copies * row.head_length,
        pairs=whole.pairs - copies * triangle(row.head_length),
    )


def make_user(name: str, prefix: int, suffixes: Sequence[int], shared: int = 0) -> TokenizedUser:
    """Random tokens of these lengths; the first ``shared`` tokens are every user's; the first candidate is right."""
    draw = random.Random(name)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, SHAPE["vocab_size"]) for _ in range(length))

    labels = tuple(int(number == 0) for number in range(len(suffixes)))
    head = tuple(range(5, 5 + shared))
    parts = tuple(tokens(length) for length in suffixes)
    return TokenizedUser(name, head + tokens(prefix - shared), parts, labels, ("",) * len(suffixes))


def suffix_lengths(name: str, longest: int, count: int) -> list[int]:
    """Of half to the whole length."""
    draw = random.Random(f"suffixes of {name}")
    return [draw.randint(longest // 2, longest) for _ in range(count)]


def middle(suffixes: Sequence[tuple[int, ...]], limit: int = MEASURED) -> list[int]:
    """Places of up to ``limit`` suffixes, those of middle length."""
    first = max(0, len(suffixes) - limit) // 2
    return sorted(range(len(suffixes)), key=lambda place: len(suffixes[place]))[first : first + limit]


def pack_prompts(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Token ids and positions of prompts behind each other, shape (1, tokens), and the prompts' lengths."""
    lengths = tuple(map(len, prompts))
    ids = torch.tensor([[token for prompt in prompts for token in prompt]])
    return ids, torch.tensor([[place for length in lengths for place in range(length)]]), lengths


def with_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose attention stays within the prompts of a packed row, given as ``blocks``."""
    AttentionInterface.register(BLOCKS, block_attention)
    model = copy.deepcopy(model)
    model.set_attn_implementation(BLOCKS)
    return model


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    blocks: tuple[int, ...] = (),
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each block of a packed row."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    parts = zip(*(x.split(blocks, dim=2) for x in (query, key, value)), strict=True)
    out = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in parts]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None
