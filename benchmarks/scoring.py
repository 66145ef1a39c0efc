"""Scoring a user's candidates by a shared prefix against the ways of other evaluations, in CPU seconds per user.

(a) every candidate alone, padded to 2048 tokens, no mask, the output head at all positions: as the paper's code
(b) every candidate alone, without padding, the output head at all positions
(c) candidates as separate sequences in packed rows, the head at the answers
(d) sharing alone: the prefix once, suffixes behind it, two rows of the head at the answers
(e) ours: beyond that the last layer at the answers alone, and the instruction once for all users of a row
"""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import Row, separate_workload, shared_workload
from benchmarks.ways import (
    ANSWERS,
    INSTRUCTION,
    PREFIXES,
    REPEATS,
    SHAPE,
    SUFFIXES,
    Step,
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
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.planner.flops import forward_flops
from trsr_dist.planner.shape import ModelShape
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow, pack_row

CANDIDATES = 21
PADDED = 2048
CPU = torch.device("cpu")


def run(scale: float) -> list[Row]:
    """All measurements, for ``grid(scale)``."""
    torch.set_num_threads(1)
    bench = Bench(LlamaConfig(**SHAPE), matrix_rate())
    rows = [row for pair in grid(scale) for row in bench.compare(*pair)]
    return rows + [row for prefix in PREFIXES[:2] for row in bench.share_instruction(prefix)]


class Bench:
    """A model, copied for every way.

    Args:
        config: of the model.
        rate: FLOP/s of a matrix product here.
    """

    def __init__(self, config: LlamaConfig, rate: float) -> None:
        self.shape = ModelShape.from_config(config.to_dict())
        self._rate = rate
        torch.manual_seed(0)
        self._model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()

    @cached_property
    def shared(self) -> Recommender:
        return Recommender(copy.deepcopy(self._model), ANSWERS, "cpu")

    @cached_property
    def blocks(self) -> nn.Module:
        return with_blocks(self._model)

    def compare(self, prefix: int, suffix: int) -> list[Row]:
        """All ways for one user."""
        user = make_user("user", prefix, suffix_lengths("user", suffix, CANDIDATES))
        ways = [self.padded(user), self.alone(user), self.packed(user), self.sharing(user), self.ours([user])]
        *others, sharing, ours = measure(ways, REPEATS)
        case = f"prefix {prefix}, suffixes to {suffix}, 1+{CANDIDATES - 1}"
        rows = [users_row("scoring", case, found, 1, self._rate) for found in (sharing, ours)]
        for other in others:
            rows += [against("scoring", case, other, fast) for fast in (sharing, ours)]
        return [*rows, against("scoring", case, sharing, ours, "gain of the last layer at the answers")]

    def share_instruction(self, prefix: int) -> list[Row]:
        """Four users in a row that begin with the same instruction, against four that do not, and one in a row."""
        suffixes = suffix_lengths("user", max(SUFFIXES), CANDIDATES)
        alike = [make_user(f"user {number}", prefix, suffixes, INSTRUCTION) for number in range(4)]
        unlike = [make_user(f"user {number}", prefix, suffixes) for number in range(4)]
        together, apart, singly = measure([self.ours(alike), self.ours(unlike), self.ours(unlike, 1)], REPEATS)
        case = f"4 users, prefix {prefix} with {INSTRUCTION} of instruction"
        return [
            against("scoring", case, apart, together, "gain of the instruction once a row"),
            against("scoring", case, singly, apart, "gain of rows of 4 users over rows of 1"),
        ]

    def padded(self, user: TokenizedUser) -> Way:
        """(a)"""
        longest = max(PADDED, len(user.prefix) + max(map(len, user.suffixes)))
        prompt = [*user.prefix, *user.suffixes[0]]
        ids = torch.tensor([prompt + [0] * (longest - len(prompt))])

        @torch.no_grad()
        def step() -> None:
            self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1, list(ANSWERS)].sum().item()

        work = separate_workload(longest, [0] * CANDIDATES)
        return Way("(a) alone, padded", step, CANDIDATES, forward_flops(self.shape, work, full_head=True))

    def alone(self, user: TokenizedUser) -> Way:
        """(b)"""
        prompts = [torch.tensor([prompt]) for prompt in _prompts(user)]

        @torch.no_grad()
        def step() -> None:
            for ids in prompts:
                self._model(input_ids=ids, use_cache=False).logits[0, -1, list(ANSWERS)].sum().item()

        return self._separate("(b) alone, tight", step, user, full_head=True)

    def packed(self, user: TokenizedUser) -> Way:
        """(c)"""
        ids, positions, lengths = pack_prompts(_prompts(user))
        ends = torch.tensor(lengths).cumsum(0) - 1

        @torch.no_grad()
        def step() -> None:
            out = self.blocks(
                input_ids=ids, position_ids=positions, blocks=lengths, use_cache=False, logits_to_keep=ends
            )
            out.logits[0, :, list(ANSWERS)].sum().item()

        return self._separate("(c) separate, packed", step, user, full_head=False)

    def sharing(self, user: TokenizedUser) -> Way:
        """(d)"""
        row, model = pack_row([user]), self.shared

        @torch.no_grad()
        def step() -> None:
            inputs = RowInputs(row, CPU)
            states = model.states(inputs, answers_only=False)
            model.pair_logits(states[inputs.layout.answer_index]).sum().item()

        work = shared_workload(len(user.prefix), [len(suffix) for suffix in user.suffixes])
        return Way("sharing alone", step, 1.0, forward_flops(self.shape, work))

    def ours(self, users: list[TokenizedUser], users_per_row: int = 4) -> Way:
        """(e)"""
        rows = [pack_row(users[first : first + users_per_row]) for first in range(0, len(users), users_per_row)]
        model = self.shared

        @torch.no_grad()
        def step() -> None:
            for row in rows:
                model(RowInputs(row, CPU), "pair").sum().item()

        return Way("ours", step, 1.0, float(sum(map(self._row_flops, rows))))

    def _row_flops(self, row: PackedRow) -> int:
        """Counted operations: shared parts once, the last layer at the answers alone."""
        return forward_flops(self.shape, row_work(row), answer_pairs=row.num_separate_tokens)

    def _separate(self, name: str, step: Step, user: TokenizedUser, full_head: bool) -> Way:
        """A way that runs some of the prompts, counted and timed for all of them."""
        prefix = len(user.prefix)
        everything = separate_workload(prefix, [len(suffix) for suffix in user.suffixes])
        measured = separate_workload(prefix, [len(user.suffixes[place]) for place in middle(user.suffixes)])
        flops = [forward_flops(self.shape, work, full_head=full_head) for work in (everything, measured)]
        return Way(name, step, flops[0] / flops[1], flops[0])


def _prompts(user: TokenizedUser) -> list[list[int]]:
    """Those that are run where each prompt is a sequence."""
    return [[*user.prefix, *user.suffixes[place]] for place in middle(user.suffixes)]
