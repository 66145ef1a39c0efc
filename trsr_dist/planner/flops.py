"""Work of LoRA training and scoring: tokens and attended pairs of prompts, and the floating point operations on them;
one multiply-add counts as two."""

from __future__ import annotations

from dataclasses import dataclass

from trsr_dist.planner.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Workload:
    """Counts of a forward pass over some prompts; they add up."""

    tokens: int = 0
    pairs: int = 0
    """Query-key pairs that causal attention looks at, in one head of one layer."""
    answers: int = 0
    """Prompts, one a candidate."""
    users: int = 0

    def __add__(self, other: Workload) -> Workload:
        return Workload(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.answers + other.answers,
            self.users + other.users,
        )

    def scaled(self, factor: float) -> Workload:
        """The counts of ``factor`` times as much work, rounded."""
        counts = (self.tokens, self.pairs, self.answers, self.users)
        return Workload(*(round(count * factor) for count in counts))


def triangle(length: int) -> int:
    """Pairs of one causal sequence."""
    return length * (length + 1) // 2


def forward_flops(
    shape: ModelShape,
    work: Workload,
    num_lora_parameters: int = 0,
    full_head: bool = False,
    answer_pairs: int | None = None,
) -> int:
    """One forward pass: ``2 N`` a token in the linear modules, ``4 d`` a pair in attention (scores and values).

    Args:
        shape: the base model.
        work: tokens, pairs and answers of the pass.
        num_lora_parameters: of an adapter that is not merged.
        full_head: multiply the output head at every token (reference practice), not two of its rows at the answers.
        answer_pairs: query-key pairs of the answers alone: the sum of the prompts' lengths; where given, the last layer
            runs at the answers alone.
    """
    saved = 0 if answer_pairs is None else last_layer_savings(shape, work, answer_pairs)
    linear = 2 * (shape.num_linear_parameters + num_lora_parameters) * work.tokens
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * work.pairs
    outputs = work.tokens * shape.vocab_size if full_head else work.answers * 2
    return linear + attention + 2 * shape.hidden_size * outputs - saved


def last_layer_savings(shape: ModelShape, work: Workload, answer_pairs: int) -> int:
    """What a forward pass saves when its last layer runs at the answers alone: elsewhere only keys and values are
    needed of it. Arguments as of ``forward_flops``."""
    keys_and_values = sum(rows * columns for rows, columns in (shape.linears["k_proj"], shape.linears["v_proj"]))
    others = shape.num_linear_parameters // shape.num_layers - keys_and_values
    return 2 * others * (work.tokens - work.answers) + 4 * shape.num_heads * shape.head_dim * (
        work.pairs - answer_pairs
    )


def training_flops(
    shape: ModelShape,
    work: Workload,
    num_lora_parameters: int,
    full_head: bool = False,
    recompute: bool = False,
    answer_pairs: int | None = None,
) -> int:
    """Forward and backward of one pass with a frozen base.

    The backward pass of a frozen weight costs one product (the input's gradient), of a trained one two, of attention
    two. Activation checkpointing adds a second forward pass.

    Args:
        shape: the base model.
        work: tokens, pairs and answers of the pass.
        num_lora_parameters: trained ones.
        full_head: the loss needs the logits of all tokens.
        recompute: with activation checkpointing.
        answer_pairs: as of ``forward_flops``.
    """
    forward = forward_flops(shape, work, num_lora_parameters, full_head, answer_pairs)
    last_pairs = work.pairs if answer_pairs is None else answer_pairs
    trained = 2 * num_lora_parameters * work.tokens
    attention = 4 * shape.num_heads * shape.head_dim * ((shape.num_layers - 1) * work.pairs + last_pairs)
    backward = forward + trained + attention
    return forward + backward + (forward if recompute else 0)
