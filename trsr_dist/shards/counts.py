"""Counts of whole epochs, kept beside the token lengths: a restart does not plan them again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict

from trsr_dist.files import read_json, write_json
from trsr_dist.hashing import digest
from trsr_dist.shards.plan import EpochFacts, TrainPlan


def epoch_facts(plan: TrainPlan, epoch: int, keep: bool = True) -> EpochFacts:
    """Counts of an epoch; the first time all its rows are planned (seconds per million samples).

    Args:
        plan: of the rows.
        epoch: from 0.
        keep: write what had to be counted; one rank does.
    """
    key = digest([plan.identity, asdict(plan.settings), epoch])[:16]
    path = plan.lengths.folder / f"epoch-{key}.json"
    if path.is_file():
        return EpochFacts(**read_json(path))
    facts = plan.facts(epoch)
    if keep:
        with suppress(PermissionError):  # lengths that another user has measured serve all the same
            write_json(path, asdict(facts))
    return facts
