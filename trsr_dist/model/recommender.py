"""A causal language model that reads packed rows and gives the answers' logits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PretrainedConfig

from trsr_dist.environment import leave_out_cudnn
from trsr_dist.model.attention.backends import NAME, Attend, build_backend, register
from trsr_dist.model.attention.layout import Layout
from trsr_dist.model.inputs import RowInputs, TextTargets
from trsr_dist.rows import PackedRow

Want = Literal["logits", "pair", "text"]
SEPARATE_TOKENS = 8192
"""Tokens of a batch where prompts run as separate sequences."""
WEIGHTS_OF = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2, torch.ops.aten._scaled_mm.default: 1}
"""Products of matrices, and which of their operands has the weights."""
MIN_ADAPTER_RATIO = 8
"""From that on a product widens its input so much that computing it again is cheaper than keeping it: LoRA's B."""
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary scalings that change with the longest position of a call, so that its prompts touch each other."""


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
        self._length_limit = length_limit(causal.config)
        if backend is not None:
            register()
            causal.set_attn_implementation(NAME)
            # With answers_only the last layer returns the answers' states alone. Exact: of the other tokens only its
            # keys and values are read. Everything after these runs on one position a prompt.
            last = causal.model.layers[-1]
            last.forward = partial(_answer_states, last, last.forward)
            self.attend = build_backend(backend)
        # The frozen head's rows of yes and no, float32, (2, hidden_size); None where it is quantized. Here and not when
        # they are first needed: under ZeRO-3 this is a collective of all ranks.
        self._answer_rows = self._answer_bias = None
        head = causal.get_output_embeddings()
        frozen = unadapted(head)
        self._is_adapted = frozen is not head
        if type(frozen) is nn.Linear:
            self._answer_rows = answer_rows(frozen.weight, answer_ids)
            self._answer_bias = None if frozen.bias is None else answer_rows(frozen.bias, answer_ids)
            if backend is None or self._is_adapted:
                frozen.register_forward_hook(self._answers_in_float32)

    @property
    def device(self) -> torch.device:
        return next(self.causal.parameters()).device

    def forward(
        self, inputs: RowInputs, want: Want, targets: TextTargets | None = None, attend: Attend | None = None
    ) -> torch.Tensor:
        """Run one row.

        Args:
            inputs: the row.
            want: ``logits``: of the whole vocabulary at the answers, (num_answers, vocab_size); ``pair``: of yes and
                no, float32, (num_answers, 2); ``text``: the weighted sum of the cross-entropy of ``targets``, a scalar.
            targets: of the full text.
            attend: in the place of the back end's attention.
        """
        if not self.shares_prefix:
            return self._separate(inputs, want)
        states = self.states(inputs, want != "text", attend)
        if want == "pair":
            return self.pair_logits(states)
        if want == "logits":
            head = self.causal.lm_head
            logits = head(states)
            return logits if self._is_adapted else self._answers_in_float32(head, (states,), logits)
        assert targets is not None
        return self._text_loss(states, targets)

    def states(self, inputs: RowInputs, answers_only: bool, attend: Attend | None = None) -> torch.Tensor:
        """The decoder's output of a row with shared prefixes: (num_tokens, hidden_size), or its answers' alone."""
        out = self.causal.model(
            input_ids=inputs.token_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            tree=(inputs.layout, attend or self.attend),
            answers_only=answers_only,
        )
        return out.last_hidden_state[0]

    def pair_logits(self, states: torch.Tensor) -> torch.Tensor:
        """float32 logits of yes and no: only these two rows of the output head are multiplied, in full precision."""
        if self._answer_rows is None or self._is_adapted:
            return self.causal.lm_head(states)[:, list(self.answer_ids)].float()
        return self._exact_logits(states)

    def _exact_logits(self, states: torch.Tensor) -> torch.Tensor:
        bias = None if self._answer_bias is None else self._answer_bias.to(states.device)
        return linear(states.float(), self._answer_rows.to(states.device), bias)

    def _answers_in_float32(self, head: nn.Module, args: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """In 16 bits logits of 16 and more are multiples of 1/8, so that most candidates of a user would be tied.

        Also a hook, for heads whose logits the model or an adapter goes on with: it may scale, cap or add to them.
        """
        if logits.dtype == torch.float32 or self._answer_rows is None:
            return logits
        logits = logits.float()
        logits[..., list(self.answer_ids)] = self._exact_logits(args[0])
        return logits

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
        logits = torch.cat([self._last_logits(*batch) for batch in self._batches(*inputs.separate)])
        return logits if want == "logits" else logits[:, list(self.answer_ids)].float()

    def _batches(self, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Padded prompts of shape (num_answers, longest), some at a time; each alone and unpadded where the longest
        one would change the others."""
        if not self._length_limit or ids.shape[1] < self._length_limit:
            size = max(1, SEPARATE_TOKENS // ids.shape[1])
            yield from zip(ids.split(size), mask.split(size), strict=True)
            return
        for place, length in enumerate(mask.sum(1).tolist()):
            for module in self.causal.modules():
                if getattr(module, "rope_type", "") == "dynamic":  # it keeps a long prompt's frequencies for later ones
                    module(ids.float(), torch.zeros_like(ids[:1, :1]))
            yield ids[place, None, :length], mask[place, None, :length]

    def _last_logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ends = mask.sum(1) - 1
        out = self.causal(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ends.unique())
        kept = torch.searchsorted(ends.unique(), ends)
        return out.logits[torch.arange(len(ids), device=ids.device), kept]


def length_limit(config: PretrainedConfig) -> int:
    """Tokens of a prompt up to which the rotary scaling is the same for all; 0: it depends on no length."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in LENGTH_DEPENDENT_ROPE:
        return 0
    return min(rope.get("original_max_position_embeddings") or sys.maxsize, text.max_position_embeddings)


def unadapted(module: nn.Module) -> nn.Module:
    """The layer that PEFT's layer adds to, or has in its place (``modules_to_save``); without an adapter the module."""
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save[module.active_adapters[0]]
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def answer_rows(weight: nn.Parameter, answer_ids: tuple[int, int]) -> torch.Tensor:
    """A head's float32 rows of yes and no, also under ZeRO-3, where all ranks ask for them."""
    with gathered(weight):
        return weight[list(answer_ids)].detach().float()


def gathered(weight: nn.Parameter) -> Any:
    """Within this context a parameter is whole, also under ZeRO-3."""
    if not hasattr(weight, "ds_id"):
        return torch.no_grad()
    from deepspeed import zero

    return zero.GatheredParameters([weight])


@torch.no_grad()
def score_row(model: nn.Module, row: PackedRow, device: torch.device) -> np.ndarray:
    """Score a row: log-odds logit(yes) - logit(no) of its answers, float32, shape (num_answers,).

    Args:
        model: a ``Recommender``, or DeepSpeed's engine around it.
        row: with at least one user.
        device: of the model.
    """
    pair = model(RowInputs(row, device), "pair")
    return (pair[:, 0] - pair[:, 1]).cpu().numpy()


def enable_recomputation(model: nn.Module, selective: bool = False) -> None:
    """Activation checkpointing (Chen et al., arXiv 1604.06174) without reentrant autograd: keeps layers' inputs only.

    With ``selective`` also what is costly to compute: the attention and the products of the base's matrices, so that
    norms, activations and the adapters' products are computed again. The last layer at the answers alone keeps its
    activations, which would be computed again at once; versions of transformers that recompute a layer's call instead
    of its ``forward`` (5.17) recompute that one too.
    """
    # transformers renamed the method in version 5.2x.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        text = model.config.get_text_config()
        mlp_output = getattr(text, "intermediate_size", None), text.hidden_size
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, mlp_output))
    enable(options)
    # transformers also makes the embeddings' output require gradients, for reentrant autograd. Without that, no
    # gradient is computed below the first adapter.
    model.disable_input_require_grads()


def _policy(mlp_output: tuple[int | None, int], ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What a layer keeps: outputs that cost many operations a number. An MLP's output is no one's input in it, and the
    recomputation ends before it; where it is a function of our own, behind it."""
    if operator is torch.ops.trsr_dist.tree_attention.default:
        return CheckpointPolicy.MUST_SAVE
    if operator not in WEIGHTS_OF:
        return CheckpointPolicy.PREFER_RECOMPUTE
    inner, outer = args[WEIGHTS_OF[operator]].shape
    is_adapter = outer >= MIN_ADAPTER_RATIO * inner
    is_native = operator is not torch.ops.aten._scaled_mm.default
    is_mlp_output = is_native and (inner, outer) == mlp_output
    return CheckpointPolicy.PREFER_RECOMPUTE if is_adapter or is_mlp_output else CheckpointPolicy.MUST_SAVE


def _answer_states(
    layer: nn.Module, whole: Any, hidden: torch.Tensor, *args: Any, answers_only: bool = False, **kwargs: Any
) -> torch.Tensor:
    """(1, num_tokens, hidden_size) to (1, num_answers, hidden_size), or as the layer itself."""
    if not answers_only:
        return whole(hidden, *args, **kwargs)
    layout, attend = kwargs["tree"]
    states = layer.input_layernorm(hidden)
    attended = _answer_attention(layer.self_attn, states, kwargs["position_embeddings"], layout, attend)
    answers = hidden[:, layout.answer_index] + attended
    return answers + layer.mlp(layer.post_attention_layernorm(answers))


def _answer_attention(
    module: nn.Module,
    states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    layout: Layout,
    attend: Attend,
) -> torch.Tensor:
    cos, sin = (x[0, :, None] for x in position_embeddings)
    index = layout.answer_index
    q = _heads(module, "q", states[:, index])
    k, v = _heads(module, "k", states), _heads(module, "v", states)
    q, k = rotate(q, cos[index], sin[index]), rotate(k, cos, sin)
    out = attend(q, k, v, layout, True, module.scaling)
    return module.o_proj(out.flatten(1)[None])


def _heads(module: nn.Module, name: str, states: torch.Tensor) -> torch.Tensor:
    """Projected states of shape (num_tokens, num_heads, head_dim), normalized where the architecture does so."""
    heads = getattr(module, f"{name}_proj")(states)[0].unflatten(-1, (-1, module.head_dim))
    norm = getattr(module, f"{name}_norm", None)
    return heads if norm is None else norm(heads)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) in the half-split form of Llama, Mistral and Qwen."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
