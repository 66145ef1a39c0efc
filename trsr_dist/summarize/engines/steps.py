"""A decoding step over the slots' buffers, captured on a GPU as a graph of its kernels (needs PyTorch, transformers).

Kernels are started one by one otherwise, which takes the host longer than the GPU needs to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from inspect import signature

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from trsr_dist.log import get_logger
from trsr_dist.summarize.engines.slots import Slots

BY_LENGTH = "trsr_by_length"
"""The name by which transformers knows ``attend_by_length``."""
CLOSE = 0.1
"""By less, of their norm, do logits in 16 bits differ with the attention; those of a wrong one by about their norm."""
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "HIP out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)

Replay = Callable[[], None]
Capture = Callable[[Replay, Collection[Replay]], Replay]
"""Of a function with effects on fixed memory only, given earlier captures, what repeats them."""

log = get_logger("summarize")


class Steps:
    """Decodes one token for each active row.

    Args:
        model: in eval mode.
        capture: how a step is captured; None: it is not, and its extent is exact.
        reads_all: captured steps read all columns of their extent. Otherwise each row's own only, unless the first step
            shows that this is not the same here.
    """

    def __init__(self, model: PreTrainedModel, capture: Capture | None, reads_all: bool = True) -> None:
        self._model = model
        self._capture = capture
        self.reads_all = reads_all
        self._is_checked = reads_all
        # transformers 5.24 renamed it; models with code of their own keep the old name.
        self._cache_name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    @classmethod
    def on(cls, model: PreTrainedModel, captures: bool) -> Steps:
        """Captured if asked for and where that can be."""
        if not captures or model.device.type != "cuda":
            return cls(model, None)
        return cls(model, partial(CudaGraph, model.device), model.dtype not in (torch.float16, torch.bfloat16))

    def run(self, slots: Slots, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the tokens, tell what follows; does not wait for the GPU.

        Args:
            slots: the cache.
            tokens: of its active rows.

        Returns:
            What ``choose`` makes of the logits, and the logits, [rows, vocabulary]. Rows beyond those of the tokens
            have no meaning. A captured step overwrites them with the next call.
        """
        if self._capture is not None:
            slots.begin(tokens, is_exact=False, reads_all=self.reads_all)
            if slots.extent in slots.graphs or self._add_graph(slots, self._capture):
                slots.graphs[slots.extent]()
                choices, logits = slots.outputs
                return choices[: slots.extent.rows], logits[: slots.extent.rows]
        slots.begin(tokens, is_exact=True)
        return self._step(slots)

    def logits(self, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
        """Of the model, which reads the cache and writes to it."""
        return self._model(**inputs, **{self._cache_name: cache}, use_cache=True).logits

    def _step(self, slots: Slots, reads_all: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        mask = slots.mask(self._model.dtype) if reads_all else slots.spans()
        logits = self.logits(slots, **slots.inputs(), attention_mask=mask)[:, -1]
        return choose(logits), logits

    def _add_graph(self, slots: Slots, capture: Capture) -> bool:
        """Capture the step over this extent; False where that fails for another reason than memory."""
        rows = slots.extent.rows

        def step() -> None:
            for output, made in zip(slots.outputs, self._step(slots, self.reads_all), strict=True):
                output[:rows].copy_(made)

        try:
            if not slots.outputs:
                outputs = self._step(slots)
                self._check(slots, outputs[1])
                slots.outputs = tuple(made.new_zeros(slots.num_slots, *made.shape[1:]) for made in outputs)
            with nullcontext() if self.reads_all else attending_by_length(self._model):
                slots.graphs[slots.extent] = capture(step, slots.graphs.values())
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            log.warning("decoding without captured graphs, more slowly: %s", str(error).partition("\n")[0])
            self._capture = None
            slots.graphs, slots.outputs = {}, ()
        return self._capture is not None

    def _check(self, slots: Slots, logits: torch.Tensor) -> None:
        """Read all columns from now on, if this model's logits are others without."""
        if self._is_checked:
            return
        try:
            with attending_by_length(self._model):
                found = self._step(slots, reads_all=False)[1]
            rows = logits.isfinite().all(-1)
            difference = float((found - logits)[rows].float().norm() / logits[rows].float().norm())
            reason = "" if difference < CLOSE else f"logits differ by {difference:.2f}"
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        self._is_checked, self.reads_all = True, bool(reason)
        if reason:
            log.warning("decoding reads all columns of the cache, more slowly: %s", reason)


def attend_by_length(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer: heads before tokens in, after them out.

    Args:
        module: the layer's attention.
        query: of one token a row.
        key: of the slots' buffers.
        value: of the same shape.
        attention_mask: ``Slots.spans``.
        scaling: of the products.
        kwargs: of other attentions.

    Raises:
        RuntimeError: the model's attention is another one.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise RuntimeError("the model's attention is more than a softmax of scaled products")
    query_starts, key_starts, seen = attention_mask[:, 0, 0]
    keys, values = _tokens_first(key), _tokens_first(value)
    out = flash(query[:, :, 0], keys, values, query_starts, key_starts, key.shape[2], scaling, seen[:-1])
    return out[:, None], None


def flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    scale: float | None,
    seen: torch.Tensor,
) -> torch.Tensor:
    """PyTorch's FlashAttention 2, [rows, heads, head size] of 16 bits on a GPU."""
    starts = (query_starts, key_starts, 1, longest)
    return torch.ops.aten._flash_attention_forward(
        query, keys, values, *starts, 0.0, False, False, scale=scale, seqused_k=seen
    )[0]


def _tokens_first(rows: torch.Tensor) -> torch.Tensor:
    """A view of [rows, heads, columns, head size] with heads inside of tokens, which begins every row's tokens at a
    multiple of the rows' distance; between the rows it has no meaning."""
    row, head, token, _ = rows.stride()
    number = (rows.shape[0] - 1) * (row // token) + rows.shape[2]
    return rows.as_strided((number, rows.shape[1], rows.shape[3]), (token, head, 1))


@contextmanager
def attending_by_length(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's attention is ``attend_by_length``."""
    AttentionInterface.register(BY_LENGTH, attend_by_length)
    before = model.config._attn_implementation
    model.set_attn_implementation(BY_LENGTH)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class CudaGraph:
    """A function's kernels, started by one call. They read and write the memory that the function did.

    Args:
        device: of the kernels.
        function: starts them, with inputs and outputs in memory that stays; it is called three times.
        others: graphs that share their temporary memory with this one, since no two run at a time.

    Raises:
        RuntimeError: it cannot be captured, as what waits for the GPU cannot, or memory does not suffice.
    """

    def __init__(self, device: torch.device, function: Replay, others: Collection[CudaGraph]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        pool = [other._graph.pool() for other in others][:1]
        stream, before = side_stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):  # the stream of before is back even where a capture cannot be ended
            function()  # libraries choose their kernels and allocate what they keep
            with refusing_waits():
                function()  # a capture that fails leaves the allocator in disorder, so it is tried before
            with torch.cuda.graph(self._graph, *pool, stream=stream, capture_error_mode="thread_local"):
                function()
        before.wait_stream(stream)

    def __call__(self) -> None:
        self._graph.replay()


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one for captures: nothing is captured on a default stream, and memory is reused on its own stream only."""
    return torch.cuda.Stream(device)


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Within, what makes the host wait for the GPU is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def choose(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, int64 [rows]; -1 where its logit is not finite."""
    largest = logits.argmax(-1, keepdim=True)
    return largest.masked_fill_(~logits.gather(-1, largest).isfinite(), -1)[:, 0]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed: on a GPU, within a library of the GPU, or on a CPU (these have no class)."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
