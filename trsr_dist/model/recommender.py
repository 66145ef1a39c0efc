"""A causal language model that reads packed rows and gives the answers' logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from trsr_dist.model.attention.backends import NAME, build_backend, register
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.last_layer import answer_at_last_layer
from trsr_dist.model.text_targets import TextTargets
from trsr_dist.pretrained import leave_out_cudnn

Want = Literal["logits", "pair", "text"]
SEPARATE_TOKENS = 8192
"""Tokens of a batch where prompts run as separate sequences."""


class Recommender(nn.Module):
    """Runs a decoder on packed rows.

    Args:
        causal: a Hugging Face causal language model, with LoRA layers in it or not.
        answer_ids: tokens of yes and no.
        backend: of the shared-prefix attention (``choose_backend``); None: every prompt is a separate sequence.
    """

    def __init__(self, causal: nn.Module, answer_ids: tuple[int, int], backend: str | None) -> None:
        super().__init__()
        leave_out_cudnn()
        self.causal = causal
        self.answer_ids = answer_ids
        self.shares_prefix = backend is not None
        if backend is not None:
            register()
            causal.set_attn_implementation(NAME)
            answer_at_last_layer(causal.model)
            self._attend = build_backend(backend)
        # Here and not when they are first needed: under ZeRO-3 this is a collective of all ranks.
        self._answer_rows = _rows_of(causal.lm_head, answer_ids)

    @property
    def device(self) -> torch.device:
        return next(self.causal.parameters()).device

    def forward(self, inputs: RowInputs, want: Want, targets: TextTargets | None = None) -> torch.Tensor:
        """Run one row.

        Args:
            inputs: the row.
            want: ``logits``: of the whole vocabulary at the answers, (num_answers, vocab_size); ``pair``: of yes and
                no, float32, (num_answers, 2); ``text``: the weighted sum of the cross-entropy of ``targets``, a scalar.
            targets: of the full text.
        """
        if not self.shares_prefix:
            return self._separate(inputs, want)
        states = self._states(inputs, answers_only=want != "text")
        if want == "pair":
            return self.pair_logits(states)
        if want == "logits":
            return self.causal.lm_head(states)
        assert targets is not None
        return self._text_loss(states, targets)

    def pair_logits(self, states: torch.Tensor) -> torch.Tensor:
        """float32 logits of yes and no: only these two rows of the output head are multiplied, in full precision."""
        if self._answer_rows is None:
            return self.causal.lm_head(states)[:, list(self.answer_ids)].float()
        return linear(states.float(), self._answer_rows.to(states.device))

    def _states(self, inputs: RowInputs, answers_only: bool) -> torch.Tensor:
        out = self.causal.model(
            input_ids=inputs.token_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            tree=(inputs.layout, self._attend),
            answers_only=answers_only,
        )
        return out.last_hidden_state[0]

    def _text_loss(self, states: torch.Tensor, targets: TextTargets) -> torch.Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        for source, target, weight in targets.pieces():
            total = total + checkpoint(self._piece_loss, states[source], target, weight, use_reentrant=False)
        return total

    def _piece_loss(self, states: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(self.causal.lm_head(states).float(), target, reduction="none")
        return (losses * weight).sum()

    def _separate(self, inputs: RowInputs, want: Want) -> torch.Tensor:
        if want == "text":
            raise ValueError("the loss of the full text needs shared prefixes")
        logits = torch.cat([self._last_logits(ids, mask) for ids, mask in _batches(*inputs.separate)])
        return logits if want == "logits" else logits[:, list(self.answer_ids)].float()

    def _last_logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ends = mask.sum(1) - 1
        out = self.causal(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ends.unique())
        kept = torch.searchsorted(ends.unique(), ends)
        return out.logits[torch.arange(len(ids), device=ids.device), kept]


def _batches(ids: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    size = max(1, SEPARATE_TOKENS // ids.shape[1])
    return zip(ids.split(size), mask.split(size), strict=True)


def _rows_of(head: nn.Module, answer_ids: tuple[int, int]) -> torch.Tensor | None:
    """The frozen head's rows of yes and no, float32, (2, hidden_size); None where it is quantized or adapted."""
    if type(head) is not nn.Linear:
        return None
    with gathered(head.weight):
        return head.weight[list(answer_ids)].detach().float()


def gathered(weight: nn.Parameter) -> Any:
    """Within this context a parameter is whole, also under ZeRO-3."""
    if not hasattr(weight, "ds_id"):
        return torch.no_grad()
    from deepspeed import zero

    return zero.GatheredParameters([weight])
