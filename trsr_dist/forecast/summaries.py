"""Prompts and tokens of the summarization, from histories alone."""

from __future__ import annotations

from dataclasses import dataclass

from trsr_dist.data.splits import SPLITS
from trsr_dist.data.store import HistoryStore
from trsr_dist.planning.cost import Cluster, Cost, generation_cost
from trsr_dist.planning.flops import forward_flops
from trsr_dist.planning.memory import BYTES
from trsr_dist.planning.shape import ModelShape
from trsr_dist.planning.tokens import Workload, triangle
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.plans import planner
from trsr_dist.summarize.plans.graph import Node, node_prompt

BYTES_PER_TOKEN = 4.0
"""Of English text under common tokenizers; used where no tokenizer is at hand."""
LOOKED_AT = 300
"""Users of a split that stand for all."""


@dataclass(frozen=True, slots=True)
class SummaryWork:
    """Prompts of all splits."""

    num_users: int
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    """At most: every summary as long as it may be."""
    pairs: int
    """Query-key pairs of the prompts."""


def summary_work(
    store: HistoryStore, scheme: str, block_size: int, fan_in: int, max_new_tokens: int, domain: str
) -> SummaryWork:
    """Estimated from the first users of each split; tokens by the length of the texts."""
    plan, filler = planner(scheme), "x" * round(max_new_tokens * BYTES_PER_TOKEN)
    totals = [0.0] * 4
    for split in SPLITS:
        size = store.num_users(split)
        looked_at = min(size, LOOKED_AT)
        for index in range(looked_at):
            items = [store.catalogue.text(item) for item in store.user(split, index).history]
            for node in plan(len(items), block_size, fan_in):
                tokens = prompt_tokens(node, items, filler, domain)
                for place, count in enumerate((1, tokens, max_new_tokens, triangle(tokens))):
                    totals[place] += count * size / looked_at
    num_users = sum(store.num_users(split) for split in SPLITS)
    return SummaryWork(num_users, *(round(total) for total in totals))


def prompt_tokens(node: Node, items: list[str], filler: str, domain: str) -> int:
    """Estimated length of a node's prompt; summaries that it reads are taken for as long as they may be."""
    prompt: SummaryPrompt = node_prompt(node, items, [filler] * len(node.parents), domain)
    return round(len(prompt.text().encode()) / BYTES_PER_TOKEN)


def forecast_summaries(shape: ModelShape, work: SummaryWork, in_flight: int, cluster: Cluster) -> Cost:
    """Cost with one copy of the summarizer on every device, in bfloat16."""
    prefill = forward_flops(shape, Workload(work.prompt_tokens, work.pairs, work.num_prompts, work.num_users))
    weight_bytes = shape.num_parameters * BYTES["bfloat16"]
    return generation_cost(cluster, prefill, work.new_tokens, weight_bytes, in_flight)
