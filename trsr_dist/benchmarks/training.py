"""A training step by shared prefixes against the ways of other trainers, in CPU seconds (or GPU seconds) per user.

(b) every prompt alone, tightly padded, the output head at all positions: as the paper's code trains
(c) separate prompts packed without padding, the head at the answers: better than common trainers do
(d) ours: the prefix once, suffixes behind it, the last layer and the head at the answers
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from trsr_dist.benchmarks.common import Row, timed
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.model.text_targets import text_targets
from trsr_dist.planning.flops import training_flops
from trsr_dist.planning.shape import ModelShape
from trsr_dist.planning.tokens import Workload, separate_workload, shared_workload
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import pack_row

SHAPE = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 1408,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}
PREFIXES = (256, 1024, 2048)
SUFFIXES = (32, 64)
CANDIDATES = (2, 5, 21)
ANSWERS = (3, 4)
LORA_RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
REPEATS = 3
MEASURED_SEQUENCES = 2
"""Separate sequences that are run; more cost as much each."""
INSTRUCTION = 60
"""Tokens that the users of a row share."""
BLOCKS = "benchmark_blocks"

Step = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make a training step."""

    name: str
    step: Step
    factor: float
    """The measured step stands for so many."""
    flops: float
    """Counted, of the whole."""


def run(scale: float) -> list[Row]:
    """All measurements; ``scale`` below 1 leaves out the longest prefixes."""
    torch.set_num_threads(1)
    bench = Bench(LlamaConfig(**SHAPE))
    rows = []
    for prefix, suffix, count in product(PREFIXES, SUFFIXES, CANDIDATES):
        if prefix <= max(PREFIXES) * scale:
            rows += bench.compare_user(prefix, suffix, count)
    for prefix, count in ((256, 2), (256, 5)):
        rows += bench.savings(prefix, count)
    return rows + bench.full_text(256, 32, 2) + bench.full_text(min(1024, round(1024 * scale)), 64, 2)


class Bench:
    """A model with LoRA layers, copied for every way."""

    def __init__(self, config: LlamaConfig) -> None:
        self.shape = ModelShape.from_config(config.to_dict())
        torch.manual_seed(0)
        self._model = AutoModelForCausalLM.from_config(config)
        settings = LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules=list(TARGETS))
        inject_adapter_in_model(settings, self._model)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    @cached_property
    def shared(self) -> Recommender:
        return Recommender(copy.deepcopy(self._model), ANSWERS, "cpu").train()

    @cached_property
    def stock(self) -> nn.Module:
        return copy.deepcopy(self._model).train()

    @cached_property
    def blocks(self) -> nn.Module:
        AttentionInterface.register(BLOCKS, block_attention)
        model = copy.deepcopy(self._model).train()
        model.set_attn_implementation(BLOCKS)
        return model

    def compare_user(self, prefix: int, suffix: int, count: int) -> list[Row]:
        """(b) and (c) against (d), for one user."""
        user = make_user("user", prefix, suffix, count)
        ours, *others = measure([self.ours([user]), self.padded(user), self.packed(user)])
        case = f"prefix {prefix}, suffixes to {suffix}, 1+{count - 1}"
        rows = [Row("training", case, ours.name, ours.seconds * 1000, "ms", f"spread {ours.spread:.0%}")]
        for other in others:
            ratio, counted = other.seconds / ours.seconds, other.flops / ours.flops
            rows.append(Row("training", case, f"{other.name} / ours", ratio, "x", share(ratio, counted)))
        return rows

    def savings(self, prefix: int, count: int) -> list[Row]:
        """What is not computed at all: the last layer away from the answers, the instruction of further users."""
        users = [make_user(f"user {number}", prefix, 32, count, INSTRUCTION) for number in range(4)]
        whole, last, both = measure(
            [
                self.ours(users, "sharing prefixes alone", answers_only=False, share_head=False),
                self.ours(users, "and the last layer at the answers", share_head=False),
                self.ours(users, "and the instruction once a row"),
            ]
        )
        case = f"4 users, prefix {prefix} with {INSTRUCTION} of instruction, 1+{count - 1}"
        return [
            Row("training", case, f"gain of {name}", before.seconds / after.seconds, "x")
            for name, before, after in (("the last layer", whole, last), ("the instruction", last, both))
        ]

    def full_text(self, prefix: int, suffix: int, count: int) -> list[Row]:
        """The loss of all tokens, as the paper's code has it."""
        user = make_user("user", prefix, suffix, count)
        ours, other = measure([self.ours([user], text=True), self.padded(user, text=True)])
        ratio = other.seconds / ours.seconds
        case = f"full text, prefix {prefix}, suffixes to {suffix}, 1+{count - 1}"
        return [Row("training", case, f"{other.name} / ours", ratio, "x", share(ratio, other.flops / ours.flops))]

    def ours(
        self,
        users: list[TokenizedUser],
        name: str = "ours",
        answers_only: bool = True,
        share_head: bool = True,
        text: bool = False,
    ) -> Variant:
        rows = [pack_row(users)] if share_head else [pack_row([user]) for user in users]
        model = self.shared

        def step() -> None:
            for row in rows:
                inputs = RowInputs(row, torch.device("cpu"))
                if text:
                    loss = model(inputs, "text", text_targets(row, ANSWERS, inputs.device))
                else:
                    states = model._states(inputs, answers_only)
                    states = states if answers_only else states[inputs.layout.answer_index]
                    loss = cross_entropy(model.causal.lm_head(states), 3 + inputs.labels)
                loss.backward()

        work = sum((shared_workload(len(u.prefix), [len(s) for s in u.suffixes]) for u in users), Workload())
        return Variant(name, step, 1.0, self._flops(work, full_head=text))

    def padded(self, user: TokenizedUser, text: bool = False) -> Variant:
        """(b)"""
        longest = len(user.prefix) + max(map(len, user.suffixes))
        prompts = [[*user.prefix, *suffix] for suffix in user.suffixes[:MEASURED_SEQUENCES]]
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
        ends = mask.sum(1) - 1

        def step() -> None:
            for number in range(len(prompts)):
                logits = self.stock(input_ids=ids[number : number + 1], attention_mask=mask[number : number + 1]).logits
                if text:
                    loss = cross_entropy(logits[0, :-1], ids[number, 1:])
                else:
                    loss = cross_entropy(logits[0, ends[number]][None], torch.tensor([3]))
                loss.backward()

        work = separate_workload(longest, [0] * len(user.suffixes))
        return Variant("padded", step, len(user.suffixes) / len(prompts), self._flops(work, full_head=True))

    def packed(self, user: TokenizedUser) -> Variant:
        """(c)"""
        prompts = [[*user.prefix, *suffix] for suffix in user.suffixes[:MEASURED_SEQUENCES]]
        lengths = tuple(map(len, prompts))
        ids = torch.tensor([[token for prompt in prompts for token in prompt]])
        positions = torch.tensor([[place for length in lengths for place in range(length)]])
        ends = torch.tensor(lengths).cumsum(0) - 1

        def step() -> None:
            out = self.blocks(
                input_ids=ids, position_ids=positions, blocks=lengths, use_cache=False, logits_to_keep=ends
            )
            cross_entropy(out.logits[0], torch.full((len(prompts),), 3)).backward()

        work = separate_workload(len(user.prefix), [len(suffix) for suffix in user.suffixes])
        return Variant("packed", step, len(user.suffixes) / len(prompts), self._flops(work))

    def _flops(self, work: Workload, full_head: bool = False) -> float:
        return training_flops(self.shape, work, self.shape.num_lora_parameters(LORA_RANK, TARGETS), full_head)


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant's time."""

    name: str
    seconds: float
    """CPU seconds of the whole, the median."""
    spread: float
    flops: float


def measure(variants: list[Variant], repeats: int = REPEATS) -> list[Measured]:
    """CPU seconds, the variants in turn, after one step of each that is not counted."""
    for variant in variants:
        variant.step()
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(repeats):
        for seconds, variant in zip(times, variants, strict=True):
            with timed() as timer:
                variant.step()
            seconds.append(timer.cpu * variant.factor)
    return [
        Measured(v.name, statistics.median(t), (max(t) - min(t)) / statistics.median(t), v.flops)
        for v, t in zip(variants, times, strict=True)
    ]


def make_user(name: str, prefix: int, suffix: int, count: int, shared: int = 0) -> TokenizedUser:
    """Random tokens; suffixes of half to the whole length; the first ``shared`` tokens are every user's."""
    draw = random.Random(name)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, SHAPE["vocab_size"]) for _ in range(length))

    suffixes = tuple(tokens(draw.randint(suffix // 2, suffix)) for _ in range(count))
    labels = tuple(int(number == 0) for number in range(count))
    return TokenizedUser(name, tuple(range(5, 5 + shared)) + tokens(prefix - shared), suffixes, labels, ("",) * count)


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


def share(ratio: float, counted: float) -> str:
    return f"counted FLOPs {counted:.2f}x, reached {ratio / counted:.2f} of it"
