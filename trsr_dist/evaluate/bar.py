"""The baselines alone: the bar for a model, from the histories, before anything is summarized or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trsr_dist.config import Config
from trsr_dist.data.store import HistoryStore
from trsr_dist.environment import array_task, detect_ranks
from trsr_dist.errors import DataError
from trsr_dist.evaluate.baselines import Ranker
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.inputs import check_draws
from trsr_dist.evaluate.outcomes import OutcomeTable
from trsr_dist.evaluate.parts import split_parts
from trsr_dist.evaluate.protocols import DrawnLists
from trsr_dist.evaluate.rankers import build_rankers
from trsr_dist.evaluate.reduce import Outcomes
from trsr_dist.evaluate.results import RankedSystems, ResultSettings, baseline_results
from trsr_dist.evaluate.stored import StoredSplit, StoredUser, labels_of, rank_all
from trsr_dist.evaluate.table import metric_table
from trsr_dist.files import write_json, writing
from trsr_dist.log import setup_logging, show
from trsr_dist.metric_names import FAMILIES
from trsr_dist.run import RunFolder, folder_lock


def evaluate_baselines(config: Config, output: str = "") -> int:
    """Rank with the asked baselines that need no language model, in one process; see tools/evaluate.py.

    Args:
        config: of the run.
        output: empty: ``RUN/evaluation``; the results go into its folder ``baselines``.

    Raises:
        RunError: the data are not prepared, or another process is at work there.
        ConfigError: the config is not that of the prepared data.
        DataError: the split has no users, or a trained baseline cannot be had.
    """
    ranks = detect_ranks()
    setup_logging(ranks.rank, "evaluate")
    if not ranks.is_main or array_task()[0]:
        return 0
    run = RunFolder(Path(config.run.dir))
    job = Evaluation(config, run, "", Path(output) if output else run.evaluation)
    path = job.baselines / f"{job.split}.json"
    with writing(job.baselines), folder_lock(job.baselines):
        results = rank_baselines(job)
        write_json(path, results)
    show(f"{summary_text(results)}\nresults: {path}")
    return 0


def rank_baselines(job: Evaluation) -> dict[str, Any]:
    """What an evaluation says of its baselines."""
    store, evaluate, seed = HistoryStore(job.run.histories), job.config.evaluate, job.config.run.seed
    check_draws(job)
    users = list(store.names(job.split))[: evaluate.max_users or None]
    if not users:
        raise DataError(f"{job.run.histories}: no user to rank for; give data.split a share for {job.split}")
    baselines, split = build_rankers(store, evaluate.baselines, seed, job.baselines), StoredSplit(store, job.split)
    lists = {job.config.data.candidates: split.stored} | {
        protocol: DrawnLists(protocol, store, split, **job.draws(), seed=seed).stored for protocol in job.protocols
    }
    settings = ResultSettings(evaluate.top_k, evaluate.bootstrap_samples, seed, None)
    own, *others = (
        baseline_results(rank_lists(baselines.rankers, users, stored, evaluate.top_k), settings)
        for stored in lists.values()
    )
    return {
        "split": job.split,
        "candidates": job.config.data.candidates,
        **own,
        "protocols": dict(zip(job.protocols, others, strict=True)),
        "baseline_training": baselines.tuning,
    }


def rank_lists(
    rankers: Mapping[str, Ranker], users: Sequence[str], stored: Callable[[str], StoredUser], top_k: Sequence[int]
) -> RankedSystems:
    """How all rankers, and chance, rank the candidates that ``stored`` gives each user."""
    outcomes = Outcomes(OutcomeTable(top_k))
    for part in split_parts(len(users)):
        found = [stored(users[index]) for index in part]
        scores = {"random": [np.zeros(len(user.candidates)) for user in found]}
        scores |= {name: rank_all(ranker, found) for name, ranker in rankers.items()}
        outcomes.add(scores, [np.array(labels_of(user)) for user in found])
    return outcomes.systems()


def summary_text(results: Mapping[str, Any]) -> str:
    """A table for each kind of candidate lists."""
    lines = []
    for candidates, entry in {results["candidates"]: results, **results["protocols"]}.items():
        names = [name for name in entry["baselines"]["random"] if name.split("@")[0] in FAMILIES]
        counts = f"{entry['num_users']} {results['split']} users, {entry['num_candidates']} candidates"
        lines += ["", f"{counts}, negatives: {candidates}", metric_table(entry, names, "system")]
    return "\n".join(lines)
