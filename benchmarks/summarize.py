"""Summarizing with the transformers engine and small models made here, in CPU-seconds, everything side by side.

Ragged prompts against one ``generate`` call each, chains by the number in flight, the scheduler on top of the engine,
and a second run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import Row, rate_row, ratio_row, timed
from benchmarks.ways import matrix_rate
from trsr_dist.hashing import random_stream
from trsr_dist.planner.flops import Workload, forward_flops, triangle
from trsr_dist.planner.shape import ModelShape
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.cache import TextCache
from trsr_dist.summarize.engines.encoding import PromptEncoder
from trsr_dist.summarize.engines.transformers import TransformersEngine
from trsr_dist.summarize.plans import planner
from trsr_dist.summarize.requests import Completion, Engine, Request
from trsr_dist.summarize.scheduler import Scheduler, Work

REPEATS = 3
"""Each way is run so often, in turns; medians count."""
NUM_RAGGED = 16
TOKENS_IN, TOKENS_OUT = (50, 800), (10, 150)
NUM_CHAINS, NODES_PER_CHAIN, BLOCK_SIZE = 40, 5, 2
IN_FLIGHT = (1, 8, 32)
MAX_NEW_TOKENS = 64
END_SHARE = 0.06
"""Share of the vocabulary that ends a chain's text: about 16 tokens a text, and hardly one cut at the limit."""
SLOTS = 32
WORDS = ["w" + "".join(letters) for letters in product("abcdefghij", repeat=3)]
"""One token each."""
LARGE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}


def run(scale: float) -> list[Row]:
    """The table; ``scale`` multiplies the numbers of prompts and of chains."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    large, tiny = make_model(tokenizer, LARGE), make_model(tokenizer, TINY)
    num_chains = max(8, round(NUM_CHAINS * scale))
    rows = against_generate(large, tokenizer, ragged(tokenizer, max(4, round(NUM_RAGGED * scale))), matrix_rate())
    for model in (large, tiny):
        model.generation_config.eos_token_id = list(range(3, 3 + round(END_SHARE * len(tokenizer))))
    return rows + _chains(tiny, tokenizer, num_chains) + _overhead(large, tokenizer, num_chains)


def against_generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    requests: list[Request],
    rate: float,
    suite: str = "summarize",
    repeats: int = REPEATS,
) -> list[Row]:
    """One ``generate`` call a prompt against the engine; CPU seconds on a CPU, elsewhere by the clock.

    Args:
        model: on its device.
        tokenizer: the model's.
        requests: of all lengths.
        rate: FLOP/s of a large matrix product, for the bound.
        suite: in the rows.
        repeats: of each way, in turns.
    """
    alone, together = [], []
    is_cpu = model.device.type == "cpu"
    unit = "new tokens/CPU-s" if is_cpu else "new tokens/s"
    for _ in range(repeats):
        with timed() as timer:
            expected = {request.key: generate(model, tokenizer, request) for request in requests}
        alone.append(timer.cpu if is_cpu else timer.wall)
        with timed() as timer:
            done = answers_of(engine_of(model, tokenizer, SLOTS), requests)
        together.append(timer.cpu if is_cpu else timer.wall)
    tokens = sum(completion.new_tokens for completion in done.values())
    case = f"{len(requests)} ragged prompts, {model.num_parameters() / 1e6:.1f}M weights"
    bound = tokens * rate / _counted(model, tokenizer, requests, done)
    same = sum(done[key].text == text for key, text in expected.items())
    note = "" if model.dtype is torch.float32 else "random weights have near-ties in this precision"
    return [
        rate_row(suite, case, "generate, one by one", tokens, alone, unit, bound),
        rate_row(suite, case, "engine", tokens, together, unit, bound),
        ratio_row(suite, case, "generate / engine", alone, together),
        Row(suite, case, "equal texts", same / len(requests), "share", note),
    ]


def _counted(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    requests: list[Request],
    done: dict[str, Completion],
) -> float:
    """FLOPs of the prompts and of all new tokens, the output head at new tokens only."""
    shape = ModelShape.from_config(model.config.to_dict())
    flops = 0
    for request in requests:
        new = done[request.key].new_tokens
        length = len(tokenizer(request.prompt.text())["input_ids"]) + new - 1
        flops += (
            forward_flops(shape, Workload(length, triangle(length))) + 2 * shape.hidden_size * shape.vocab_size * new
        )
    return flops


def _chains(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_chains: int) -> list[Row]:
    seconds: dict[int, list[float]] = {number: [] for number in IN_FLIGHT}
    texts: dict[int, dict[int, str]] = {}
    for _ in range(REPEATS):
        for number in IN_FLIGHT:
            with tempfile.TemporaryDirectory() as folder, timed() as timer:
                engine = engine_of(model, tokenizer, number)
                engine.capacity = number
                texts[number] = _schedule(engine, Path(folder), num_chains)
            seconds[number].append(timer.cpu)
    nodes = num_chains * NODES_PER_CHAIN
    case = f"{num_chains} recurrent chains, {nodes} nodes, {model.num_parameters() / 1e6:.1f}M weights"
    rows = [rate_row("summarize", case, f"{n} in flight", nodes, seconds[n], "nodes/CPU-s") for n in IN_FLIGHT]
    same = sum(found == texts[1] for found in texts.values()) / len(texts)
    return [
        *rows,
        ratio_row("summarize", case, "1 in flight / 32 in flight", seconds[1], seconds[32]),
        Row("summarize", case, "equal texts", same, "share"),
    ]


def _overhead(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_chains: int) -> list[Row]:
    """Scheduler, keys, cache and quality gate: what a run costs outside the engine's own work."""
    shares, calls = [], 0
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            first, again = (_Timed(engine_of(model, tokenizer, SLOTS)) for _ in range(2))
            with timed() as timer:
                texts = _schedule(first, Path(folder), num_chains)
            assert _schedule(again, Path(folder), num_chains) == texts
        shares.append(100 * (timer.cpu / first.seconds - 1))
        calls += again.num_requests
    case = f"{num_chains} recurrent chains, {model.num_parameters() / 1e6:.1f}M weights"
    measure = "scheduler on top of the engine"
    return [
        Row("summarize", case, measure, median(shares), "%", low=min(shares), high=max(shares)),
        Row("summarize", case, "engine calls of a second run", calls, "calls"),
    ]


class _Timed:
    """An engine whose CPU-seconds and requests are counted."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.close = engine.close
        self.seconds = 0.0
        self.num_requests = 0

    @property
    def capacity(self) -> int:
        return self._engine.capacity

    def submit(self, request: Request) -> None:
        self.num_requests += 1
        self._count(self._engine.submit, request)

    def poll(self) -> list[Completion]:
        return self._count(self._engine.poll)

    def _count(self, function: Callable[..., Any], *args: object) -> Any:
        start = time.process_time()
        result = function(*args)
        self.seconds += time.process_time() - start
        return result


def _schedule(engine: Engine, folder: Path, num_chains: int) -> dict[int, str]:
    """Run chains of short prompts; the last texts by user."""
    num_items = NODES_PER_CHAIN * BLOCK_SIZE
    plan = planner("recurrent")(num_items, BLOCK_SIZE, 0)
    works = (Work(user, plan, [_words(3, "item", user, i) for i in range(num_items)]) for user in range(num_chains))
    cache = TextCache(folder, f"task-{len(list(folder.iterdir()))}")
    scheduler = Scheduler(engine, {"engine": "benchmark"}, cache, "news", MAX_NEW_TOKENS)
    found = {result.tag: result.records[-1]["text"] for result in scheduler.run(lambda: next(works, None))}
    cache.close()
    return found


def engine_of(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_slots: int, captures: bool = True
) -> TransformersEngine:
    return TransformersEngine(model, PromptEncoder(tokenizer, "plain", max(TOKENS_IN)), num_slots, captures)


def answers_of(engine: TransformersEngine, requests: list[Request]) -> dict[str, Completion]:
    for request in requests:
        engine.submit(request)
    done: dict[str, Completion] = {}
    while len(done) < len(requests):
        done |= {completion.key: completion for completion in engine.poll()}
    return done


@torch.inference_mode()
def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, request: Request) -> str:
    inputs = tokenizer(request.prompt.text(), return_tensors="pt", return_token_type_ids=False).to(model.device)
    out = model.generate(**inputs, max_new_tokens=request.max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ragged(tokenizer: PreTrainedTokenizerFast, number: int) -> list[Request]:
    """Prompts and answers of all lengths within the limits."""
    requests = []
    for i in range(number):
        draw = random_stream("ragged", i)
        length, new_tokens = draw.randint(*TOKENS_IN), draw.randint(*TOKENS_OUT)
        prompt = SummaryPrompt("Summarize.", (), (_words(length, "ragged", i),))
        excess = len(tokenizer(prompt.text())["input_ids"]) - length
        prompt = SummaryPrompt("Summarize.", (), (_words(length - excess, "ragged", i),))
        requests.append(Request(str(i), prompt, new_tokens))
    return requests


def _words(number: int, *keys: object) -> str:
    draw = random_stream("words", *keys)
    return " ".join(draw.choice(WORDS) for _ in range(number))


def make_model(tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int]) -> LlamaForCausalLM:
    """A random Llama that never ends a text by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, eos_token_id=None, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE made here, with one token for each of the words and no end token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f" {word}" for word in WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
