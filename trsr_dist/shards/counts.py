"""Counts of whole epochs, kept beside the token lengths: a restart does not plan them again."""

from __future__ import annotations

import os
from dataclasses import asdict

from trsr_dist.files import read_json, write_json
from trsr_dist.hashing import digest
from trsr_dist.shards.measure import wait_for
from trsr_dist.shards.plan import EpochFacts, TrainPlan


def epoch_facts(plan: TrainPlan, epoch: int, rank: int = 0) -> EpochFacts:
    """Counts of an epoch; the first time rank 0 plans all its rows (seconds per million samples), and the others wait.

    Beside lengths that another user has measured nothing may be kept: then every rank counts for itself.

    Args:
        plan: of the rows.
        epoch: from 0.
        rank: this process.

    Raises:
        DataError: rank 0 has stopped counting.
    """
    key = digest([plan.identity, asdict(plan.settings), epoch])[:16]
    folder = plan.lengths.folder
    path = folder / f"epoch-{key}.json"
    may_keep = os.access(folder, os.W_OK)
    if rank and may_keep:
        wait_for(folder, path.is_file)
    if path.is_file():
        return read_json(path, EpochFacts)
    facts = plan.facts(epoch)
    if may_keep:
        write_json(path, asdict(facts))
    return facts
