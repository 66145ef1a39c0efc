"""What an evaluation suggests to try next: the rules of docs/recipes.md, and the recipe that was used. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

NUM_WINDOWS = 4
"""Of the training's log lines, the last two of which are compared."""
MIN_RISE = 0.005
"""Of the train AUC, from one window to the next, which counts as rising."""
FEW = 0.05
"""Shares of users or pairs below this do not matter."""


def what_to_try(results: Mapping[str, Any], train_auc: Sequence[float], metric: str) -> list[str]:
    """One sentence for each thing that stands out, the most important first; empty where nothing does.

    Args:
        results: of the evaluation.
        train_auc: of the training's log lines, in order; empty where they are not known.
        metric: that decides, such as ``recall@5``.
    """
    return list(_suggestions(results, train_auc, metric))


def _suggestions(results: Mapping[str, Any], train_auc: Sequence[float], metric: str) -> Iterator[str]:
    gain = results["personalization_gain"].get(metric, {})
    if gain.get("low", 1) <= 0:
        yield (
            "The score does not depend on the user: train with harder negatives (data.candidates=targets) and a loss "
            "over a user's candidates (train.loss=listwise)."
        )
    if is_rising(train_auc):
        yield "The train AUC still rose when the training ended: more epochs (train.num_epochs)."
    if is_below(results, "bm25", metric):
        yield (
            "BM25 is better: look at the prompt (prompt.recent_items, data.item_fields with the words that decide "
            "first, prompt.max_tokens)."
        )
    elif any(is_below(results, name, metric) for name in ("sasrec", "gru4rec")):
        yield "A model of item ids is better: more train users or train targets before a larger base."
    if (summary := results["differences"].get("no_summary", {}).get(metric)) and summary.get("low", 1) <= 0:
        yield "Without the summary it is as good: summarize.scheme=raw tells whether any text of older items helps."
    trimmed = results.get("trims", {}).get("users", 0) / max(results["num_users"], 1)
    if trimmed > FEW:
        yield f"{trimmed:.0%} of the users' prompts were cut: raise prompt.max_tokens or shorten the summaries."
    if results["tie_rate"] > FEW:
        yield "Many candidates tie: their texts may be cut to the same words (prompt.max_candidate_tokens)."


def is_rising(values: Sequence[float]) -> bool:
    """Whether the last quarter is above the one before."""
    size = len(values) // NUM_WINDOWS
    return size > 0 and mean(values[-size:]) - mean(values[-2 * size : -size]) > MIN_RISE


def is_below(results: Mapping[str, Any], system: str, metric: str) -> bool:
    """Whether the model is worse than the system, by the interval of their paired difference."""
    return results["differences"].get(system, {}).get(metric, {}).get("high", 0) < 0


def recipe(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What made the model, by name; what is not recorded is left out."""
    config, train = provenance.get("config", {}), provenance.get("train", {})
    lora, summarize, prompt = (config.get(name, {}) for name in ("lora", "summarize", "prompt"))
    modules = lora.get("target_modules", "")
    rows = {
        "base": provenance.get("base", {}).get("name_or_path"),
        "summaries": _join(summarize.get("scheme"), summarize.get("engine"), summarize.get("model")),
        "recent items": prompt.get("recent_items"),
        "loss": train.get("loss"),
        "negatives per positive": train.get("negatives_per_positive"),
        "learning rate": train.get("learning_rate"),
        "steps": train.get("step"),
        "LoRA": lora and _join(f"r {lora.get('r')}", modules if isinstance(modules, str) else ", ".join(modules)),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "", {})]


def _join(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)
