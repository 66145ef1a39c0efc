"""From a user's history and summaries to a sample, with the leak guard and the provenance. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trsr_dist.errors import DataError
from trsr_dist.hashing import digest
from trsr_dist.records import Candidate, Item, Sample
from trsr_dist.summarize.plans.graph import Plan
from trsr_dist.words import comparable


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What a user's sample adds to the counts of its unit."""

    repeated_targets: int
    """Targets consumed before, which data.repeated_target kept."""
    near_duplicates: int
    """Targets whose text equals that of another item in the history."""


def check_leaks(user: str, history: Sequence[Item], targets: Sequence[Item], repeated_kept: bool) -> SampleFacts:
    """Compare a user's targets with the sources of the summary.

    Raises:
        DataError: a target is among them, and data.repeated_target is not ``keep``.
    """
    ids, texts = {item.id for item in history}, {comparable(item.text) for item in history}
    repeated = [item.id for item in targets if item.id in ids]
    if repeated and not repeated_kept:
        raise DataError(
            f"user {user!r}: target {repeated[0]!r} is also in the history that the summary is made from; prepare the "
            "data anew, or count such users in with data.repeated_target=keep"
        )
    near = sum(item.id not in ids and comparable(item.text) in texts for item in targets)
    return SampleFacts(len(repeated), near)


def make_sample(
    user: str,
    instruction: str,
    history: Sequence[Item],
    candidates: Sequence[Candidate],
    num_recent: int,
    summary: str,
    provenance: dict[str, Any],
) -> Sample:
    """A user's sample.

    Args:
        user: the user's key.
        instruction: of the recommender.
        history: the whole history, oldest first.
        candidates: to be scored.
        num_recent: so many of the latest items are shown in full.
        summary: of the history; empty: none.
        provenance: kept with the sample.
    """
    return Sample(
        user=user,
        instruction=instruction,
        summary=summary,
        recent=tuple(item.text for item in history[-num_recent:]) if num_recent else (),
        candidates=tuple(candidates),
        provenance=provenance | {"history": [item.id for item in history]},
    )


def node_provenance(plan: Plan, records: Sequence[dict[str, Any]], history: Sequence[Item]) -> dict[str, Any]:
    """What a summary was made of: its nodes, its blocks, and the quality flags met on the way.

    A node is (kind, span of the history, key of the text, hash of the prompt); a block's id is the hash of its items'
    ids.
    """
    nodes = [
        [node.kind, node.start, node.stop, record["key"], record["prompt"]]
        for node, record in zip(plan, records, strict=bool(records))
    ]
    spans = [(node.start, node.stop) for node in plan if node.start < node.stop]
    return {
        "blocks": [digest([item.id for item in history[start:stop]])[:16] for start, stop in spans],
        "nodes": nodes,
        "flags": sorted({flag for record in records for flag in record["flags"]}),
        "sampled": sum(record.get("sampled", False) for record in records),
        "words_cut": sum(record.get("words_cut", 0) for record in records),
    }
