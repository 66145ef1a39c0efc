"""A training step by shared prefixes against the ways of other trainers, in CPU seconds per user.

(b) every prompt alone, padded to the user's longest, the output head at all positions: as the paper's code trains
(c) separate prompts packed without padding, the head at the answers: better than common trainers do
(d) ours: the prefix once, suffixes behind it, the last layer and the head at the answers

Bounds are ratios of counted operations, with all that ours leaves out; with two layers, the last one weighs more than
in a large model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import Row, separate_workload
from benchmarks.mixes import AMAZON, MIND, Mix
from benchmarks.ways import (
    ANSWERS,
    INSTRUCTION,
    LORA_RANK,
    MEASURED,
    REPEATS,
    SHAPE,
    TARGETS,
    Measured,
    Way,
    against,
    grid,
    make_user,
    matrix_rate,
    measure,
    middle,
    pack_prompts,
    row_work,
    suffix_lengths,
    users_row,
    with_blocks,
)
from trsr_dist.model.inputs import RowInputs, text_targets
from trsr_dist.model.recommender import Recommender
from trsr_dist.planner.flops import Workload, training_flops
from trsr_dist.planner.shape import ModelShape
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow, pack_row

CANDIDATES = (2, 5, 21)
MIX_USERS = range(1, 10, 3)
"""Users of a mix: the quantiles at 15%, 45% and 75%."""


def run(scale: float) -> list[Row]:
    """All measurements, for ``grid(scale)``."""
    torch.set_num_threads(1)
    bench = Bench(LlamaConfig(**SHAPE), matrix_rate())
    rows = [row for pair in grid(scale) for row in bench.compare(*pair)]
    for mix, count in product((MIND, AMAZON), CANDIDATES[:2]):
        rows += bench.compare_mix(mix, count)
    for count in CANDIDATES[:2]:
        rows += bench.savings(256, count)
    return rows + bench.full_text(256, 32) + bench.full_text(min(1024, round(1024 * scale)), 64)


class Bench:
    """A model with LoRA layers, copied for every way.

    Args:
        config: of the model.
        rate: FLOP/s of a matrix product here.
    """

    def __init__(self, config: LlamaConfig, rate: float) -> None:
        self.shape = ModelShape.from_config(config.to_dict())
        self._rate = rate
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
        return with_blocks(self._model).train()

    def compare(self, prefix: int, suffix: int) -> list[Row]:
        """(b) and (c) against (d), for one user with few and with many candidates.

        (b) and (c) cost as much for every prompt, so they are run once for all numbers of candidates.
        """
        users = [make_user("user", prefix, suffix_lengths("user", suffix, count)) for count in CANDIDATES]
        *ours, padded, packed = measure(
            [*(self.ours([user]) for user in users), self.padded(users[:1]), self.packed(users[:1])], REPEATS
        )
        rows = []
        for user, found in zip(users, ours, strict=True):
            case = f"prefix {prefix}, suffixes to {suffix}, 1+{len(user.suffixes) - 1}"
            others = _scaled(padded, self.padded([user])), _scaled(packed, self.packed([user]))
            rows += self._rows(case, [user], found, others)
        return rows

    def compare_mix(self, mix: Mix, count: int) -> list[Row]:
        """The same for some users of a data set, ours in one row."""
        lengths = mix.users(MIX_USERS, count)
        users = [
            make_user(f"user {number}", prefix, suffixes, mix.head) for number, (prefix, suffixes) in enumerate(lengths)
        ]
        ours, *others = measure([self.ours(users), self.padded(users), self.packed(users)], REPEATS)
        return self._rows(f"{mix.name}'s lengths, 1+{count - 1}", users, ours, others)

    def savings(self, prefix: int, count: int) -> list[Row]:
        """What is not computed at all, one after the other."""
        suffixes = suffix_lengths("user", 32, count)
        users = [make_user(f"user {number}", prefix, suffixes, INSTRUCTION) for number in range(4)]
        to_inputs, whole, last, both = measure(
            [
                self.ours(users, answers_only=False, share_head=False, reach_inputs=True),
                self.ours(users, answers_only=False, share_head=False),
                self.ours(users, share_head=False),
                self.ours(users),
            ],
            REPEATS,
        )
        case = f"4 users, prefix {prefix} with {INSTRUCTION} of instruction, 1+{count - 1}"
        below = against("training", case, to_inputs, whole, "gain of no backward below the adapters")
        return [
            replace(below, bound=None),
            against("training", case, whole, last, "gain of the last layer at the answers"),
            against("training", case, last, both, "gain of the instruction once a row"),
        ]

    def full_text(self, prefix: int, suffix: int) -> list[Row]:
        """The loss of all tokens, as the paper's code has it."""
        user = make_user("user", prefix, suffix_lengths("user", suffix, 2))
        ours, other = measure([self.ours([user], text=True), self.padded([user], text=True)], REPEATS)
        return [against("training", f"full text, prefix {prefix}, suffixes to {suffix}, 1+1", other, ours)]

    def ours(
        self,
        users: list[TokenizedUser],
        answers_only: bool = True,
        share_head: bool = True,
        text: bool = False,
        reach_inputs: bool = False,
    ) -> Way:
        """(d), or with less left out."""
        rows = [pack_row(users)] if share_head else [pack_row([user]) for user in users]
        model = self.shared

        def step() -> None:
            embeddings = model.causal.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_(reach_inputs))
            for row in rows:
                inputs = RowInputs(row, torch.device("cpu"))
                if text:
                    loss = model(inputs, "text", text_targets(row, ANSWERS, inputs.device, row.num_tokens))
                else:
                    states = model.states(inputs, answers_only)
                    states = states if answers_only else states[inputs.layout.answer_index]
                    loss = cross_entropy(model.causal.lm_head(states), 3 + inputs.labels, reduction="sum")
                loss.backward()
            hook.remove()

        return Way("ours", step, 1.0, sum(self._row_flops(row, answers_only, text) for row in rows))

    def padded(self, users: Sequence[TokenizedUser], text: bool = False) -> Way:
        """(b)"""
        prompts = [prompt for user in users for prompt in _padded_prompts(user)]

        def step() -> None:
            for ids, mask, label in prompts:
                logits = self.stock(input_ids=ids, attention_mask=mask).logits[0]
                end = int(mask.sum()) - 1
                loss = cross_entropy(logits[:-1], ids[0, 1:]) if text else cross_entropy(logits[end], 3 + label)
                loss.backward()

        lengths = [(len(user.prefix) + max(map(len, user.suffixes)), len(user.suffixes)) for user in users]
        whole, run = (
            self._flops(
                sum((separate_workload(longest, [0] * min(limit, count)) for longest, count in lengths), Workload()),
                full_head=True,
            )
            for limit in (max(CANDIDATES), MEASURED)
        )
        return Way("(b) padded", step, whole / run, whole)

    def packed(self, users: Sequence[TokenizedUser]) -> Way:
        """(c)"""
        rows = []
        for user in users:
            places = middle(user.suffixes)
            rows.append(
                (
                    *pack_prompts([[*user.prefix, *user.suffixes[place]] for place in places]),
                    torch.tensor([user.labels[place] for place in places]),
                )
            )

        def step() -> None:
            for ids, positions, lengths, labels in rows:
                out = self.blocks(
                    input_ids=ids,
                    position_ids=positions,
                    blocks=lengths,
                    use_cache=False,
                    logits_to_keep=torch.tensor(lengths).cumsum(0) - 1,
                )
                cross_entropy(out.logits[0], 3 + labels, reduction="sum").backward()

        whole, run = (
            self._flops(
                sum(
                    (
                        separate_workload(
                            len(user.prefix), [len(user.suffixes[place]) for place in middle(user.suffixes, limit)]
                        )
                        for user in users
                    ),
                    Workload(),
                )
            )
            for limit in (max(CANDIDATES), MEASURED)
        )
        return Way("(c) packed", step, whole / run, whole)

    def _rows(self, case: str, users: list[TokenizedUser], ours: Measured, others: Sequence[Measured]) -> list[Row]:
        rows = [users_row("training", case, ours, len(users), self._rate)]
        return rows + [against("training", case, other, ours) for other in others]

    @property
    def _num_lora(self) -> int:
        return self.shape.num_lora_parameters(LORA_RANK, TARGETS)

    def _flops(self, work: Workload, full_head: bool = False) -> float:
        return training_flops(self.shape, work, self._num_lora, full_head)

    def _row_flops(self, row: PackedRow, answers_only: bool, text: bool) -> float:
        if text or not answers_only:
            return self._flops(row_work(row), full_head=text)
        return training_flops(self.shape, row_work(row), self._num_lora, answer_pairs=row.num_separate_tokens)


def _scaled(measured: Measured, whole: Way) -> Measured:
    """From some prompts to all those of another way."""
    factor = whole.flops / measured.flops
    return Measured(whole.name, tuple(seconds * factor for seconds in measured.times), whole.flops)


def _padded_prompts(user: TokenizedUser) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids and mask, shape (1, longest), and the label of each prompt."""
    longest = len(user.prefix) + max(map(len, user.suffixes))
    found = []
    for place in middle(user.suffixes):
        prompt = [*user.prefix, *user.suffixes[place]]
        rest = longest - len(prompt)
        mask = torch.tensor([[1] * len(prompt) + [0] * rest])
        found.append((torch.tensor([prompt + [0] * rest]), mask, torch.tensor(user.labels[place])))
    return found
