"""The summarizer's engine by the number of texts in flight, against what the planner's formula lets expect."""

from __future__ import annotations

import time
from statistics import median

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


class Stopwatch(TransformersEngine):
    """The engine; keeps the seconds of the steps that decode with nearly all places taken."""

    def __init__(self, model: LlamaForCausalLM, encoder: PromptEncoder, num_slots: int) -> None:
        super().__init__(model, encoder, num_slots)
        self.step_seconds: list[float] = []

    def _decode(self) -> None:
        counts = len(self._active) >= FULL * self.num_slots
        began = time.perf_counter()
        super()._decode()  # ends with the tokens on the host
        if counts:
            self.step_seconds.append(time.perf_counter() - began)


def by_in_flight(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, numbers: tuple[int, ...], rate: float, bandwidth: float
) -> list[Row]:
    """New tokens a second and milliseconds of a decoding step, by the clock; the bound is that of the device, without
    the host's time.

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
    answers_of(TransformersEngine(model, encoder, number), requests[:2])
    engine = Stopwatch(model, encoder, number)
    with timed() as timer:
        done = answers_of(engine, requests)
    shape = ModelShape.from_config(model.config.to_dict())
    work = work_of(requests, done)
    planned = generation_cost(cluster, generation(shape, work, number, engine="", precision="bfloat16")).seconds
    case = f"{len(requests)} ragged prompts, {model.num_parameters() / 1e6:.1f}M weights"
    tokens, steps = work.new_tokens, [1000 * seconds for seconds in engine.step_seconds]
    rows = [
        Row("gpu", case, f"engine, {number} in flight", tokens / timer.wall, "new tokens/s", bound=tokens / planned),
    ]
    if steps:
        layers = model.config.num_hidden_layers
        note = f"{median(steps) / layers:.2f} ms a layer; {len(steps)} steps"
        measure = f"a step, {number} in flight"
        rows.append(Row("gpu", case, measure, median(steps), "ms", note, min(steps), max(steps)))
    return rows


def work_of(requests: list[Request], done: dict[str, Completion]) -> SummaryWork:
    """What was generated, as the planner counts it."""
    prompts = [done[request.key].prompt_tokens for request in requests]
    new_tokens = sum(completion.new_tokens for completion in done.values())
    number = len(requests)
    return SummaryWork(number, 1, number, sum(prompts), new_tokens, sum(map(triangle, prompts)))
