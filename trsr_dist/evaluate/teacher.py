"""A model's log-odds for all candidates and pool items of the train users: what distillation, mining and the choice of
summaries read.

RUN/shards/train/scores-{model}-{shards}/
    identity.json, part-*.jsonl   as in an evaluation: parts that a restart uses again
    table.npy, manifest.json      all of them by sample and candidate, once no part is missing

No other split is ever scored here: a student that saw what a teacher says of a test user would have seen the target.

Hard negatives are chosen by them: of each user's pool those that a model ranks high, but not so high that they may be
positives. The choice is a table beside the shards, too, which the packing reads: no text is written, no summary made
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trsr_dist import distributed
from trsr_dist.config import Config, dump_config
from trsr_dist.environment import Ranks, array_task, detect_ranks
from trsr_dist.errors import ConfigError
from trsr_dist.evaluate.evaluation import Evaluation, trained_on_these_shards
from trsr_dist.evaluate.passes import ScoringPass, split_parts
from trsr_dist.evaluate.score import WAIT_SECONDS, claim_folder, clear_folder, complete, open_models, score_everything
from trsr_dist.evaluate.score_files import ScoreFolder, expected_of
from trsr_dist.evaluate.users import SplitUsers
from trsr_dist.files import atomic_folder, writing
from trsr_dist.locks import Claim, folder_lock
from trsr_dist.log import get_logger, setup_logging, show
from trsr_dist.model.artifacts import follow, model_identity
from trsr_dist.run import MANIFEST, RunFolder, is_finished
from trsr_dist.shards.cache import open_cache
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.tables import MINED, open_table, scores_folder, write_table

log = get_logger("score")


@dataclass(frozen=True, slots=True)
class TrainScoring(Evaluation):
    """One model on the train users; ``output`` is the folder of the scores."""

    @property
    def split(self) -> str:
        return "train"

    @property
    def folder(self) -> Path:
        return self.output

    @property
    def passes(self) -> list[ScoringPass]:
        return [ScoringPass("model")]

    def scores(self, entry: ScoringPass) -> ScoreFolder:
        return ScoreFolder(self.output)


def score_shards(config: Config, model: str, force: bool = False) -> int:
    """Run the job; see tools/score_shards.py.

    Args:
        config: of the run whose train shards are scored.
        model: merged folder, checkpoint or adapter; ``RUN/merged`` and the like stand for folders of the run.
        force: score again.

    Raises:
        RunError: the folder holds scores made with other settings, or another job is at work there.
        ConfigError: the config is not that of the prepared data.
        ModelError: the model cannot be opened, or has other answers than the config.
        DataError: the shards are damaged, or a score is not finite.
    """
    ranks = detect_ranks()
    setup_logging(ranks.rank, "score")
    with distributed.process_group(ranks, WAIT_SECONDS, bool(config.evaluate.deepspeed_config)):
        for job, shards in plan_scoring(config, model):
            with writing(job.folder):
                _score(job, shards, ranks, force)
    return 0


def _score(job: TrainScoring, shards: ShardSet, ranks: Ranks, force: bool) -> None:
    with ExitStack() as stack:
        job = complete(job, force)
        claims: list[Claim] = []
        distributed.on_rank_zero(lambda: claims.append(stack.enter_context(claim_folder(job))))
        users, models = SplitUsers(shards, 0, job.config.run.seed, {}), open_models(job)
        shards.check_recent_items(models["model"].builder.recent_items)
        clear = (lambda: clear_folder(job, claims[0])) if force else None
        folder = score_everything(job, users, models, ranks, clear)["model"]
        if ranks.is_main:
            _publish(job, shards, folder, trained_on_these_shards(job, models["model"].provenance))


def plan_scoring(config: Config, model: str) -> list[tuple[TrainScoring, ShardSet]]:
    """What is scored, and where its scores lie: the run's train shards, or with ``summarize.samples`` those of each
    sample."""
    run, train, samples = RunFolder(Path(config.run.dir)), config.train, config.summarize.samples
    model = str(follow(Path(run.resolve(model))))
    identity, cache = model_identity(model, config.model.revision), open_cache(train.cache_dir, train.cache_gb)
    everyone = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_users": 0})})
    planned = []
    for folder in [run.sample(number) for number in range(samples)] or [run]:
        shards = ShardSet(folder.split("train"), cache, url="" if samples else train.shards_url)
        planned.append((TrainScoring(everyone, folder, model, scores_folder(shards.folder, identity)), shards))
    return planned


def _publish(job: TrainScoring, shards: ShardSet, folder: ScoreFolder, trained_here: bool | None) -> None:
    missing = folder.missing(len(shards))
    if missing and array_task()[1] > 1:
        log.info("left to other tasks: %d parts; the last task to finish completes the scores", len(missing))
        return
    if not (job.folder / MANIFEST).is_file():
        folder.check_names(len(shards))
        parts = ([expected_of(shards.read(index)) for index in part] for part in split_parts(len(shards)))
        rows = [user.scores for number, part in enumerate(parts) for user in folder.read(number, part)]
        write_table(
            job.folder, rows, shards.manifest_hash, "score", folder.recorded(), trained_on_these_shards=trained_here
        )
    show(f"scores of {len(shards)} train users: {job.folder}")


def mine_negatives(
    config: Config, model: str, num_negatives: int, margin: float, force: bool = False, dry_run: bool = False
) -> int:
    """Run the job; see tools/mine_negatives.py.

    Args:
        config: of the run whose train shards are mined.
        model: whose scores ``tools/score_shards.py`` has put there.
        num_negatives: that stay in the pool, per positive.
        margin: see ``choose_hard``.
        force: replace a pool that was mined with other scores or settings.
        dry_run: say what would be mined, and touch nothing.

    Raises:
        ConfigError: ``summarize.samples`` is set, or the samples keep fewer negatives.
        RunError: the model has not scored these shards, or a pool of other settings is there.
        DataError: shards or scores are damaged.
    """
    setup_logging(stage="mine")
    if config.summarize.samples:
        raise ConfigError("summarize.samples is set: negatives are mined for the train shards; leave it at 0")
    [(job, shards)] = plan_scoring(config, model)
    scores = open_table(
        job.folder, shards.manifest_hash, f"run tools/score_shards.py with this config and --model {model}"
    )
    folder = shards.folder / MINED
    settings = {"scores": scores.sha256, "negatives_per_positive": num_negatives, "margin": margin}
    if dry_run:
        show(f"{dump_config(config)}\nhard negatives of {len(shards)} train users: {folder}")
        return 0
    with writing(folder), folder_lock(folder) as lock:
        if is_finished(folder, settings, {"shards": shards.manifest_hash}, force):
            show(f"{folder}: already mined with these settings; nothing to do (--force redoes it)")
            return 0
        positives = [np.array(shards.outline(index).labels) > 0 for index in range(len(shards))]
        check_pools(shards, positives, num_negatives)
        chosen = [
            choose_hard(row[: len(is_positive)], is_positive, num_negatives, margin)
            for row, is_positive in zip(scores.values, positives, strict=True)
        ]
        num_filled = sum(filled for _, filled in chosen)
        with atomic_folder(folder, lock.check) as new:
            write_table(
                new, [pool for pool, _ in chosen], shards.manifest_hash, "mine", settings, num_filled=num_filled
            )
    num_kept = sum(int(pool.sum()) for pool, _ in chosen)
    show(f"{folder}: {num_kept} candidates of {len(chosen)} train users stay, {num_filled} of them above the margin")
    return 0


def check_pools(shards: ShardSet, positives: Sequence[np.ndarray], num_negatives: int) -> None:
    """A few users may have less to choose from; not all of them taken together.

    Raises:
        ConfigError: nothing would be left out.
    """
    num_positives = sum(int(labels.sum()) for labels in positives)
    kept = sum(map(len, positives)) // max(1, num_positives) - 1
    if kept < num_negatives:
        raise ConfigError(
            f"--negatives {num_negatives}: the samples of {shards.folder} keep {kept} a positive; lower it, or prepare "
            "again with a larger train.pool_size"
        )


def choose_hard(
    scores: np.ndarray, is_positive: np.ndarray, num_negatives: int, margin: float
) -> tuple[np.ndarray, int]:
    """The positives and the hardest negatives whose odds are at most ``margin`` times the lowest positive's.

    After the percentage to the positive of NV-Retriever (arXiv 2407.15831), on odds in place of similarities: only
    differences of log-odds count, so the model's loss need not give them a scale. Where too few negatives are left,
    those least above the margin fill the pool, so that every user keeps equally many.

    Args:
        scores: float32 log-odds, shape (num_candidates,).
        is_positive: bool, shape (num_candidates,).
        num_negatives: that stay, per positive.
        margin: above 0.

    Returns:
        bool, shape (num_candidates,): whether each candidate stays; and how many fill the pool.
    """
    limit = scores[is_positive].min() + math.log(margin)
    is_above = scores > limit
    # Positives last; then by side of the limit, then by distance from it: the hardest below, the safest above.
    order = np.lexsort((np.abs(scores - limit), is_above, is_positive))
    taken = order[: min(num_negatives * int(is_positive.sum()), int((~is_positive).sum()))]
    pool = is_positive.copy()
    pool[taken] = True
    return pool, int(is_above[taken].sum())
