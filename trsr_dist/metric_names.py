"""Names of the ranking metrics. Pure: the config knows them too."""

from __future__ import annotations

from collections.abc import Sequence

FAMILIES = ("recall", "mrr", "ndcg")


def metric_names(top_k: Sequence[int]) -> list[str]:
    """Names in the order of the tables: recall@3, ..., mrr@3, ..., ndcg@3, ..., auc."""
    return [f"{family}@{k}" for family in FAMILIES for k in top_k] + ["auc"]


def headline(top_k: tuple[int, ...]) -> str:
    """The metric of the sentences and figures that show one only."""
    return f"recall@{top_k[len(top_k) // 2]}"
