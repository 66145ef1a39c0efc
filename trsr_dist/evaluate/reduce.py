"""From part files to results: coverage, baselines without a language model, metrics, table, report, TensorBoard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from trsr_dist.config import dump_config
from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.environment import array_task
from trsr_dist.evaluate.baselines import Bm25, Ranker, by_count, target_counts
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.metrics import FAMILIES, metric_names, user_metrics
from trsr_dist.evaluate.parts import split_parts
from trsr_dist.evaluate.results import ResultSettings, ScoredSystems, build_results, metric_values
from trsr_dist.evaluate.scores import UserScores, check_coverage
from trsr_dist.evaluate.sequential import MODELS, train_sequential
from trsr_dist.evaluate.split import SplitUsers, StoredSplit, StoredUser, rank_all, user_facts
from trsr_dist.evaluate.table import gain_line, metric_table
from trsr_dist.files import write_json
from trsr_dist.log import MetricLog, get_logger
from trsr_dist.run import folder_lock, write_manifest

log = get_logger("evaluate")


@dataclass(frozen=True, slots=True)
class Reduced:
    """What the report shows."""

    results: dict[str, Any]
    systems: ScoredSystems
    values: dict[str, np.ndarray]


def reduce_scores(job: Evaluation, users: SplitUsers, provenance: dict[str, Any]) -> None:
    """Write the results if all parts of all passes are there; otherwise other array tasks are still at work.

    Raises:
        DataError: the scores do not cover the split exactly.
        RunError: another process is reducing.
    """
    num_parts = len(split_parts(len(users)))
    missing = {entry.name: job.scores(entry).missing(num_parts) for entry in job.passes}
    if any(missing.values()) and array_task()[1] > 1:
        counts = ", ".join(f"{name} {len(parts)}" for name, parts in missing.items() if parts)
        log.info("left to other tasks: parts of %s; the last task to finish writes the results", counts)
        return
    with folder_lock(job.folder):
        reduced = build(job, users, provenance)
        write_json(job.results, reduced.results)
        write_manifest(job.folder, "evaluate", job.settings(), job.inputs())
        job.run.write_config("evaluate", dump_config(job.config))
    write_scalars(job, reduced.results)
    print(summary_text(job, reduced.results), flush=True)


def build(job: Evaluation, users: SplitUsers, provenance: dict[str, Any]) -> Reduced:
    """All numbers."""
    pairs = list(users.pairs())
    scored = {entry.name: read_pass(job, entry, pairs) for entry in job.passes}
    store = HistoryStore(job.run.histories)
    split = StoredSplit(store, job.split)
    stored = [split.find(user, items) for user, items, _ in pairs]
    scores = {name: [user.scores for user in found] for name, found in scored.items()}
    scores |= {name: rank_all(ranker, stored) for name, ranker in build_rankers(job, store).items()}
    systems = ScoredSystems([user.labels for user in scored["model"]], scores)
    values = metric_values(systems, job.config.evaluate.top_k)
    facts = collect_facts(users, store, stored, scored["model"])
    settings = ResultSettings(
        job.config.evaluate.top_k,
        job.config.evaluate.bootstrap_samples,
        job.config.run.seed,
        provenance.get("train", {}).get("negatives_per_positive"),
    )
    head = {"split": job.split, "model": job.model, "candidates": job.config.data.candidates}
    tail = {"trims": count_trims(scored["model"]), "provenance": provenance}
    return Reduced(head | build_results(systems, values, facts, settings) | tail, systems, values)


def read_pass(job: Evaluation, entry: Any, pairs: list[tuple[str, list[str], list[int]]]) -> list[UserScores]:
    """Scores of a pass in the order of the split, each (user, candidate) exactly once."""
    found = job.scores(entry).read()
    check_coverage(pairs, found)
    by_user = {user.user: user for user in found}
    return [by_user[user] for user, _, _ in pairs]


def build_rankers(job: Evaluation, store: HistoryStore) -> dict[str, Ranker]:
    """The asked baselines that need no language model."""
    items, rankers = range(len(store.catalogue)), {}
    asked = job.config.evaluate.baselines
    if "popularity" in asked:
        rankers["popularity"] = by_count(np.array([store.catalogue.popularity(item) for item in items]))
    if "recency" in asked:
        rankers["recency"] = by_count(target_counts(train_targets(store), len(items)))
    if "bm25" in asked:
        rankers["bm25"] = Bm25([store.catalogue.text(item) for item in items])
    for name in MODELS:
        if name in asked:
            rankers[name] = train_on(store, name, job.config.run.seed)
    return rankers


def train_on(store: HistoryStore, name: str, seed: int) -> Ranker:
    """A sequential model of the train users; its best epoch is chosen on the validation users' candidates."""
    train = [store.user("train", index) for index in range(store.num_users("train"))]
    sequences = [[*row.history, *targets_of(row)] for row in train]
    valid = [store.user("valid", index) for index in range(store.num_users("valid"))]
    log.info("%s: training on %d users", name, len(sequences))
    return train_sequential(name, sequences, len(store.catalogue), lambda ranker: mean_ndcg(ranker, valid), seed)


def mean_ndcg(ranker: Ranker, rows: list[UserRow]) -> float:
    """NDCG@10 over users of the store."""
    place = metric_names((10,)).index("ndcg@10")
    values = [user_metrics(ranker(row.history, row.candidates), np.array(row.labels), (10,))[place] for row in rows]
    return float(np.mean(values)) if values else 0.0


def train_targets(store: HistoryStore) -> list[list[int]]:
    """The train users' targets, item rows."""
    return [targets_of(store.user("train", index)) for index in range(store.num_users("train"))]


def targets_of(row: UserRow) -> list[int]:
    """A user's targets, item rows."""
    return [item for item, label in zip(row.candidates, row.labels, strict=True) if label]


def collect_facts(
    users: SplitUsers, store: HistoryStore, stored: list[StoredUser], scored: list[UserScores]
) -> list[dict[str, str]]:
    """What the slices tell users apart by."""
    return [user_facts(store, users.sample(index), stored[index], scored[index].trims) for index in range(len(users))]


def count_trims(scored: list[UserScores]) -> dict[str, int]:
    """Users whose prompts were cut to fit, and the sums of what was cut."""
    counts = Counter({"users": sum(bool(user.trims) for user in scored)})
    for user in scored:
        counts.update(user.trims)
    return dict(sorted(counts.items()))


def write_scalars(job: Evaluation, results: dict[str, Any]) -> None:
    """Metrics, gains and baselines to metrics.jsonl and TensorBoard, at the training step of the model."""
    step = int(results["provenance"].get("train", {}).get("step") or 0)
    scalars = {f"{job.split}/{name}": value for name, value in results["metrics"].items()}
    for name, values in results["baselines"].items():
        scalars |= {f"{job.split}_{name}/{metric}": value for metric, value in values.items()}
    for metric, gain in results["personalization_gain"].items():
        scalars[f"{job.split}_gain/{metric}"] = gain["mean"]
    metrics = MetricLog(job.run.root, "evaluate", job.config.run.tensorboard)
    metrics.write(step, scalars)
    metrics.close()


def summary_text(job: Evaluation, results: dict[str, Any]) -> str:
    """The final table and where everything lies."""
    top_k = job.config.evaluate.top_k
    names = [name for name in metric_names(top_k) if name.split("@")[0] in FAMILIES]
    systems = {**results["baselines"], "model": results["metrics"]}
    lines = [
        "",
        f"{results['num_users']} {job.split} users, {results['num_candidates']} candidates, negatives: "
        f"{results['candidates']}",
        metric_table(systems, names, "system"),
    ]
    middle = f"recall@{top_k[len(top_k) // 2]}"
    if middle in results["personalization_gain"]:
        lines.append(gain_line(results["personalization_gain"][middle], middle))
    lines += [
        f"results: {job.results}",
        f"scores: {job.folder}",
        f"TensorBoard: tensorboard --logdir {job.run.root / 'tensorboard'}",
    ]
    return "\n".join(lines)
