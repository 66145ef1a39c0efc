"""Hugging Face transformers with continuous batching: a finished sequence's place is taken at once by a waiting one.

Prompts are prefilled in small batches of similar length without a mask, then decoded together. Greedy decoding in
float32 gives the text that ``generate`` gives for each prompt alone.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from inspect import signature

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from trsr_dist.environment import leave_out_cudnn
from trsr_dist.errors import DataError, ModelError
from trsr_dist.log import get_logger
from trsr_dist.pretrained import BaseSource, load_causal, load_tokenizer, local_source, max_positions, warn_without_gpu
from trsr_dist.summarize.engines.encoding import PromptEncoder, naming_setting
from trsr_dist.summarize.engines.slots import Slots
from trsr_dist.summarize.quality import turn_place
from trsr_dist.summarize.requests import Completion, EngineSettings, Request

PREFILL_ROWS = 8
PREFILL_WASTE = 1.25
"""Prompts are prefilled together while padding adds at most this factor."""
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "HIP out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
NOT_FINITE = (
    "the model's logits are not finite; try another summarize.precision (models trained in bfloat16 often overflow in "
    "float16)"
)
STOP_CHECK_TOKENS = 8
"""Between two looks for a stop string."""

log = get_logger("summarize")


@dataclass(slots=True, eq=False)
class Sequence:
    """A request as the engine sees it."""

    request: Request
    prompt: list[int]
    words_cut: int = 0
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None


class TransformersEngine:
    """Generates with a model of this process.

    Args:
        model: a decoder with full attention in all layers, in eval mode.
        encoder: its tokenizer, with the prompt's style and limit.
        num_slots: sequences decoded at once.

    Raises:
        ModelError: the model has layers that this engine's cache does not serve.
    """

    def __init__(self, model: PreTrainedModel, encoder: PromptEncoder, num_slots: int) -> None:
        check_attention(model, encoder.max_prompt_tokens)
        leave_out_cudnn()
        self.capacity = 2 * num_slots
        self.model = model
        self.encoder = encoder
        self.num_slots = num_slots
        self._given_slots = num_slots
        configured = model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        self._stop_ids = {token for token in (*ids, encoder.tokenizer.eos_token_id) if token is not None}
        self._context = context_tokens(model)
        # transformers 5.24 renamed it; models with code of their own keep the old name.
        self._cache_name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._active: list[Sequence] = []
        self._done: list[Completion] = []
        self._slots = self._new_slots()

    @classmethod
    def load(cls, settings: EngineSettings, local_rank: int = 0) -> TransformersEngine:
        """Load model and tokenizer, onto this task's GPU where there is one.

        On a CPU one thread is used: matrix products split their sums by threads, and texts shall not depend on how the
        work was divided.

        Raises:
            ModelError: they cannot be loaded.
        """
        num_gpus = torch.cuda.device_count()
        device = torch.device("cuda", local_rank % num_gpus) if num_gpus else torch.device("cpu")
        if not num_gpus:
            torch.set_num_threads(1)
        precision = settings.precision
        if precision == "auto":
            precision = "bfloat16" if num_gpus else "float32"
        with naming_setting(settings.model):
            source = local_source(BaseSource(settings.model, settings.revision, settings.trust_remote_code))
            tokenizer = load_tokenizer(source)
            model = load_causal(source, getattr(torch, precision)).to(device).eval()
        warn_without_gpu(model, settings.model)
        return cls(model, PromptEncoder.of(tokenizer, settings), settings.max_in_flight)

    def submit(self, request: Request) -> None:
        try:
            prompt, words_cut = self.encoder.fit(request.prompt)
        except DataError as error:
            self._done.append(Completion(request.key, error=str(error)))
            return
        needed = len(prompt) + request.max_new_tokens
        if needed > self._context:
            reason = f"{needed} tokens with the answer, {self._context} in the model's context; "
            self._done.append(Completion(request.key, error=reason + "lower summarize.max_prompt_tokens"))
            return
        self._waiting.append(Sequence(request, prompt, words_cut))

    def poll(self) -> list[Completion]:
        while not self._done and (self._waiting or self._active):
            if not self._step():
                self._shrink()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self._waiting.clear()
        self._active.clear()
        self._slots.clear()

    def _new_slots(self) -> Slots:
        return Slots(self.model.config.get_text_config().num_hidden_layers, self.num_slots, self.model.device)

    def _step(self) -> bool:
        """Prefill or decode; False where memory does not suffice."""
        try:
            # Prefill a few at a time while others are decoding, for a step costs as much for one.
            free = min(self.num_slots - len(self._active), len(self._waiting))
            if free > 0 and (not self._active or free >= min(len(self._waiting), max(1, self.num_slots // 8))):
                self._prefill(free)
            else:
                self._decode()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    @torch.inference_mode()
    def _prefill(self, free: int) -> None:
        """Run the first prompt of the queue and those of similar length among the next, up to ``free`` in all.

        They are padded on the right: what stands behind a token does not touch it, so no mask is needed.
        """
        nearby = sorted((self._waiting.popleft() for _ in range(free)), key=lambda sequence: -len(sequence.prompt))
        taken = [nearby[0]]
        for sequence in nearby[1:PREFILL_ROWS]:
            lengths = [len(other.prompt) for other in (*taken, sequence)]
            if lengths[0] * len(lengths) > PREFILL_WASTE * sum(lengths):
                break
            taken.append(sequence)
        self._waiting.extendleft(reversed(nearby[len(taken) :]))
        self._prefilling = taken
        lengths = [len(sequence.prompt) for sequence in taken]
        ids = torch.zeros(len(taken), max(lengths), dtype=torch.long)
        for row, sequence in enumerate(taken):
            ids[row, : lengths[row]] = torch.tensor(sequence.prompt)
        last = torch.tensor([length - 1 for length in lengths], device=self.model.device)
        wanted, place = torch.unique(last, return_inverse=True)
        cache = DynamicCache()
        logits = self._run(cache, input_ids=ids.to(self.model.device), logits_to_keep=wanted)
        room = max(length + s.request.max_new_tokens for length, s in zip(lengths, taken, strict=True))
        self._slots.admit(cache, lengths, room)
        self._active += taken
        self._prefilling = []
        self._append(logits[torch.arange(len(taken)), place], len(self._active) - len(taken))

    @torch.inference_mode()
    def _decode(self) -> None:
        """One token for every active sequence."""
        ids = torch.tensor([[sequence.tokens[-1]] for sequence in self._active], device=self.model.device)
        positions, mask = self._slots.positions[:, None], self._slots.mask(self.model.dtype)
        logits = self._run(self._slots, input_ids=ids, position_ids=positions, attention_mask=mask)
        self._slots.advance()
        self._append(logits[:, -1], 0)

    def _run(self, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
        """The model's logits; it reads the cache, and writes to it."""
        return self.model(**inputs, **{self._cache_name: cache}, use_cache=True).logits

    def _append(self, logits: torch.Tensor, first: int) -> None:
        """Add a token to the active sequences from ``first`` on; those that end leave their place.

        Args:
            logits: [sequences, vocabulary].
            first: position of the first one.
        """
        largest = logits.argmax(-1, keepdim=True)
        is_finite, choices = logits.gather(-1, largest).isfinite().tolist(), largest.tolist()
        for row in range(len(choices) - 1, -1, -1):
            sequence = self._active[first + row]
            if not is_finite[row][0]:
                self._slots.wipe(first + row)
                completion = Completion(sequence.request.key, error=NOT_FINITE)
            else:
                token = sample(logits[row], sequence) if sequence.request.temperature else choices[row][0]
                sequence.tokens.append(token)
                completion = self._ended(sequence)
            if completion is not None:
                self._done.append(completion)
                self._slots.drop(first + row)
                self._active[first + row] = self._active[-1]
                self._active.pop()

    def _ended(self, sequence: Sequence) -> Completion | None:
        tokens = sequence.tokens
        by_token = tokens[-1] in self._stop_ids
        full = len(tokens) >= sequence.request.max_new_tokens
        if not (by_token or full or len(tokens) % STOP_CHECK_TOKENS == 0):
            return None
        text = self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        # Where the next turn begins; with a chat template the model ends its turn itself.
        stopped = None if self.encoder.style == "chat" else turn_place(text)
        if not (by_token or full or stopped is not None):
            return None
        cut = full and not by_token and stopped is None
        written = self.encoder.opening + text[:stopped]
        return Completion(sequence.request.key, written, cut, len(sequence.prompt), len(tokens), sequence.words_cut)

    def _shrink(self) -> None:
        """Out of memory: start over with half the places. A sequence that does not fit alone has failed; it was to
        blame for the last halvings, so all places are tried again."""
        started = [*self._active, *self._prefilling]
        self._active, self._prefilling = [], []
        num_slots = self.num_slots // 2
        if not num_slots:
            num_slots = self._given_slots
            failed = started.pop()
            reason = f"out of memory with a prompt of {len(failed.prompt)} tokens alone"
            self._done.append(Completion(failed.request.key, error=reason))
        self.num_slots, self.capacity = num_slots, 2 * num_slots
        self._slots.clear()
        self._slots = self._new_slots()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: going on with %d sequences at once", num_slots)
        self._waiting.extendleft(reversed([Sequence(s.request, s.prompt, s.words_cut) for s in started]))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed: on a GPU, within a library of the GPU, or on a CPU (these have no class)."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def sample(logits: torch.Tensor, sequence: Sequence) -> int:
    """Draw a token, from the sequence's own random stream."""
    if sequence.generator is None:
        sequence.generator = torch.Generator().manual_seed(sequence.request.seed)
    probabilities = (logits.float() / sequence.request.temperature).softmax(-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=sequence.generator))


def context_tokens(model: PreTrainedModel) -> int:
    """Tokens that the model and this engine's cache take: up to a sliding window's length, all tokens are seen."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else True
    return min(max_positions(config), (getattr(config, "sliding_window", None) if slides else None) or sys.maxsize)


def check_attention(model: PreTrainedModel, max_prompt_tokens: int) -> None:
    """Refuse models whose cache is more than keys and values of all tokens, and prompts that cannot fit.

    Raises:
        ModelError: says why, and the way out.
    """
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "attention_layers", None) or ())}
    if kinds - {"full_attention", "sliding_attention", "global"}:
        raise ModelError(
            f"model {model.config.name_or_path!r} has {', '.join(sorted(kinds))} layers, which engine=transformers "
            "does not batch; serve the model with vLLM and use engine=openai"
        )
    if context_tokens(model) <= max_prompt_tokens:
        raise ModelError(
            f"model {model.config.name_or_path!r} takes {context_tokens(model)} tokens (its context, or its sliding "
            f"window), not summarize.max_prompt_tokens={max_prompt_tokens} and an answer; lower that, or serve the "
            "model with vLLM and use engine=openai"
        )
