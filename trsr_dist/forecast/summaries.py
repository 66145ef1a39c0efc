"""Prompts and tokens of the summarization, from histories alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trsr_dist.data.store import HistoryStore
from trsr_dist.planning.cost import Cluster, Cost, Generation, generation_cost
from trsr_dist.planning.flops import forward_flops
from trsr_dist.planning.memory import key_value_bytes
from trsr_dist.planning.shape import ModelShape
from trsr_dist.planning.tokens import Workload, triangle
from trsr_dist.planning.weights import weight_bytes
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.run import SPLITS
from trsr_dist.summarize.plans import planner
from trsr_dist.summarize.plans.graph import Node, node_prompt

BYTES_PER_TOKEN = 4.0
"""Of English text under common tokenizers; used where no tokenizer is at hand."""
LOOKED_AT = 300
"""Users of a split that stand for all."""
PRECISION = "bfloat16"
LAYER_SECONDS = {"transformers": 1e-3}
"""By engine: host's time of a layer in a decoding step, as measured beside an H200 (docs/gpu_results.md). Servers
replay graphs of kernels, which costs the host next to nothing."""


@dataclass(frozen=True, slots=True)
class SummarySettings:
    """What the prompts depend on, beside the histories."""

    scheme: str
    block_size: int
    fan_in: int
    max_prompt_tokens: int
    max_new_tokens: int
    users_per_unit: int
    domain: str
    num_in_flight: int
    engine: str

    @property
    def most_tokens(self) -> int:
        """Of a prompt with its answer."""
        return self.max_prompt_tokens + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class SummaryWork:
    """Prompts of all splits."""

    num_users: int
    num_units: int
    """Of users, each worked on by one task."""
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    """At most: every summary as long as it may be."""
    pairs: int
    """Query-key pairs of the prompts."""


@dataclass(frozen=True, slots=True)
class SummaryForecast:
    """A summarization on a cluster, with one copy of the model on every device."""

    work: SummaryWork
    weight_bytes: int = 0
    """Of a device; 0: no model generates."""
    key_value_bytes: int = 0
    """Of a device: of the longest prompts and answers, as many as are in flight."""
    cost: Cost | None = None
    """None: no model generates."""


def summary_work(store: HistoryStore, settings: SummarySettings) -> SummaryWork:
    """Estimated from the first users of each split; tokens by the length of the texts."""
    totals = [0.0] * 4
    for split in SPLITS:
        size = store.num_users(split)
        looked_at = min(size, LOOKED_AT)
        for index in range(looked_at):
            items = [store.catalogue.text(item) for item in store.user(split, index).history]
            for tokens in prompt_lengths(items, settings):
                for place, count in enumerate((1, tokens, settings.max_new_tokens, triangle(tokens))):
                    totals[place] += count * size / looked_at
    num_users = [store.num_users(split) for split in SPLITS]
    num_units = sum(-(-users // settings.users_per_unit) for users in num_users)
    return SummaryWork(sum(num_users), num_units, *(round(total) for total in totals))


def prompt_lengths(items: list[str], settings: SummarySettings) -> Iterator[int]:
    """Estimated tokens of a user's prompts; summaries that they read are taken for as long as they may be."""
    filler = "x" * round(settings.max_new_tokens * BYTES_PER_TOKEN)
    for node in planner(settings.scheme)(len(items), settings.block_size, settings.fan_in):
        yield min(settings.max_prompt_tokens, prompt_tokens(node, items, filler, settings.domain))


def prompt_tokens(node: Node, items: list[str], filler: str, domain: str) -> int:
    """Estimated length of a node's prompt before it is trimmed."""
    prompt: SummaryPrompt = node_prompt(node, items, [filler] * len(node.parents), domain)
    return round(len(prompt.text().encode()) / BYTES_PER_TOKEN)


def forecast_summaries(
    shape: ModelShape, work: SummaryWork, settings: SummarySettings, cluster: Cluster
) -> SummaryForecast:
    """Memory and cost, in bfloat16."""
    weights = weight_bytes(shape, PRECISION)
    most = key_value_bytes(shape, settings.num_in_flight * settings.most_tokens, PRECISION)
    cost = generation_cost(cluster, generation(shape, work, settings.num_in_flight, settings.engine))
    return SummaryForecast(work, weights, most, cost)


def generation(shape: ModelShape, work: SummaryWork, num_in_flight: int, engine: str = "") -> Generation:
    """The work in operations and bytes. A new token reads its prompt and, on average, half of the answer.

    Args:
        shape: of the model.
        work: its prompts.
        num_in_flight: texts that are decoded at once.
        engine: of ``summarize.engine``; without one the host's time counts for nothing.
    """
    prompts = Workload(work.prompt_tokens, work.pairs, work.num_prompts, work.num_users)
    context = (work.prompt_tokens + work.new_tokens / 2) / max(1, work.num_prompts)
    token = Workload(tokens=1, pairs=round(context))
    return Generation(
        prefill_flops=forward_flops(shape, prompts),
        num_new_tokens=work.new_tokens,
        flops_per_token=forward_flops(shape, token) + 2 * shape.hidden_size * shape.vocab_size,
        weight_bytes=weight_bytes(shape, PRECISION),
        context_bytes=key_value_bytes(shape, round(context), PRECISION),
        num_in_flight=num_in_flight,
        num_units=work.num_units,
        step_seconds=shape.num_layers * LAYER_SECONDS.get(engine, 0.0),
    )
