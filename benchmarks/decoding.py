"""The summarizer's engine by the number of texts in flight, against what the planner's formula lets expect: with the
decoding step's kernels started by one call, as captured graphs, and one by one."""

from __future__ import annotations

import time
from statistics import median

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import Row, timed
from benchmarks.summarize import TOKENS_IN, answers_of, ragged
from trsr_dist.planner.cost import Cluster, generation_cost
from trsr_dist.planner.flops import triangle
from trsr_dist.planner.hardware import Hardware
from trsr_dist.planner.shape import ModelShape
from trsr_dist.planner.stages import generation
from trsr_dist.planner.work import SummaryWork
from trsr_dist.summarize.engines.encoding import PromptEncoder
from trsr_dist.summarize.engines.transformers import TransformersEngine
from trsr_dist.summarize.requests import Completion, Request

ROUNDS = 2
"""Prompts, as a multiple of those in flight."""
FULL = 0.9
"""Share of the places that are taken in a step which counts."""
WAYS = {"": True, ", uncaptured": False}
"""Of starting kernels, as the rows' names end: whether steps are captured, where there is a GPU."""


class Stopwatch(TransformersEngine):
    """The engine; keeps the seconds of the steps that decode with nearly all places taken."""

    def __init__(self, model: LlamaForCausalLM, encoder: PromptEncoder, num_slots: int, captures: bool) -> None:
        super().__init__(model, encoder, num_slots, captures)
        self.step_seconds: list[float] = []
        self.host_seconds: list[float] = []
        """Of the same steps, without those in which the host waits for the device."""
        self._waited = 0.0

    def _decode(self) -> None:
        counts = len(self._active) >= FULL * self.num_slots
        began = time.perf_counter()
        super()._decode()  # ends with the tokens on the host
        if counts:
            seconds = time.perf_counter() - began
            self.step_seconds.append(seconds)
            self.host_seconds.append(seconds - self._waited)

    def _append(self, choices: torch.Tensor, logits: torch.Tensor, first: int) -> None:
        began = time.perf_counter()
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self._waited = time.perf_counter() - began
        super()._append(choices, logits, first)


def by_in_flight(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, numbers: tuple[int, ...], rate: float, bandwidth: float
) -> list[Row]:
    """New tokens a second, milliseconds of a decoding step and the host's of a layer, by the clock, in each way; the
    bound is that of the device, without the host's time.

    Args:
        model: on its device.
        tokenizer: the model's.
        numbers: of texts in flight.
        rate: FLOP/s of a large matrix product.
        bandwidth: bytes that the device's memory reads and writes in a second.
    """
    device = Hardware("measured", rate, 1, bandwidth, 1.0)
    cluster = Cluster(device, num_nodes=1, devices_per_node=1, utilization=1.0)
    return [row for number in numbers for row in _rows(model, tokenizer, number, cluster)]


def _rows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, number: int, cluster: Cluster) -> list[Row]:
    requests = ragged(tokenizer, ROUNDS * number)
    encoder = PromptEncoder(tokenizer, "plain", max(TOKENS_IN))
    case = f"{len(requests)} ragged prompts, {model.num_parameters() / 1e6:.1f}M weights"
    shape = ModelShape.from_config(model.config.to_dict())
    rows, rates = [], []
    for way, captures in WAYS.items():
        engine = Stopwatch(model, encoder, number, captures)
        answers_of(engine, requests if captures else requests[:2])  # a long run has captured all after a while
        engine.step_seconds, engine.host_seconds = [], []
        with timed() as timer:
            done = answers_of(engine, requests)
        work = work_of(requests, done)
        planned = generation_cost(cluster, generation(shape, work, number, engine="", precision="bfloat16")).seconds
        rates.append(work.new_tokens / timer.wall)
        measure, bound = f"engine, {number} in flight{way}", work.new_tokens / planned
        rows.append(Row("gpu", case, measure, rates[-1], "new tokens/s", bound=bound))
        rows += _step_rows(engine, case, f"{number} in flight{way}")
        engine.close()
    return [*rows, Row("gpu", case, f"captured / uncaptured, {number} in flight", rates[0] / rates[1], "x")]


def _step_rows(engine: Stopwatch, case: str, way: str) -> list[Row]:
    if not engine.step_seconds:
        return []
    layers = engine.model.config.num_hidden_layers
    steps, hosts = ([1000 * value for value in seconds] for seconds in (engine.step_seconds, engine.host_seconds))
    hosts = [value / layers for value in hosts]
    note = f"{median(steps) / layers:.2f} ms a layer; {len(steps)} steps"
    note += "" if engine._steps.reads_all else "; attention by length"
    return [
        Row("gpu", case, f"a step, {way}", median(steps), "ms", note, min(steps), max(steps)),
        Row("gpu", case, f"host, a layer of a step, {way}", median(hosts), "ms", "", min(hosts), max(hosts)),
    ]


def work_of(requests: list[Request], done: dict[str, Completion]) -> SummaryWork:
    """What was generated, as the planner counts it."""
    prompts = [done[request.key].prompt_tokens for request in requests]
    new_tokens = sum(completion.new_tokens for completion in done.values())
    number = len(requests)
    return SummaryWork(number, 1, number, sum(prompts), new_tokens, sum(map(triangle, prompts)))
