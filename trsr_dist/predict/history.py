"""A user's items as the training showed them: shortened, and summarized without a model. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trsr_dist.summarize.extract import extract
from trsr_dist.summarize.plans import planner, writer
from trsr_dist.summarize.plans.graph import Plan, node_prompt

EXTRACTIVE = "extractive"


@dataclass(frozen=True, slots=True)
class HistorySettings:
    """How the training's shards were made, as far as it is recorded with the model."""

    scheme: str = "hierarchical"
    block_size: int = 5
    fan_in: int = 8
    max_words: int = 150
    """Length limit of a summary."""
    engine: str = EXTRACTIVE
    """That wrote the training's summaries."""
    max_items: int = 0
    """Longer histories are cut to their latest items; 0: none is."""

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> HistorySettings:
        """From a model's provenance; the defaults where it holds none."""
        config = provenance.get("config", {})
        recorded = config.get("summarize", {})
        values = {name: recorded[name] for name in ("scheme", "block_size", "fan_in", "engine") if name in recorded}
        if "max_new_tokens" in recorded:
            values["max_words"] = recorded["max_new_tokens"]
        return cls(**values, max_items=config.get("data", {}).get("max_history", 0))

    def cut(self, items: Sequence[str]) -> Sequence[str]:
        """The latest items that count."""
        return items[-self.max_items :] if self.max_items else items

    def plan(self, num_items: int) -> Plan:
        """The prompts of so many items; empty where the scheme asks no engine."""
        return planner(self.scheme)(num_items, self.block_size, self.fan_in)


def summarize_items(items: Sequence[str], settings: HistorySettings, domain: str, num_recent: int) -> str:
    """The extractive summary of item texts, oldest first, or what the scheme has in its place; empty without items.

    Args:
        items: texts of the history.
        settings: of the training.
        domain: wording of the prompts.
        num_recent: so many of the latest items stand in the recommender's prompt already.
    """
    plan = settings.plan(len(items))
    if not plan:
        return writer(settings.scheme)(items, num_recent, settings.max_words)
    texts: list[str] = []
    for node in plan:
        prompt = node_prompt(node, items, [texts[parent] for parent in node.parents], domain)
        texts.append(extract(prompt, settings.max_words))
    return texts[-1]
