"""Hard negatives: of each train user's pool those that a model ranks high, but not so high that they may be positives.

The choice is a table beside the shards, which the packing reads: no text is written, no summary made again.
"""

from __future__ import annotations

import math

import numpy as np

from trsr_dist.config import Config, dump_config
from trsr_dist.errors import ConfigError
from trsr_dist.evaluate.score_files import ScoreFolder
from trsr_dist.evaluate.teacher import plan_scoring, scored_users
from trsr_dist.files import atomic_folder, writing
from trsr_dist.locks import folder_lock
from trsr_dist.log import setup_logging, show
from trsr_dist.run import is_finished
from trsr_dist.shards.tables import MINED, open_table, write_table


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
        ConfigError: ``summarize.samples`` is set.
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
        users = scored_users(shards, ScoreFolder(job.folder))
        chosen = [choose_hard(user.scores, user.labels > 0, num_negatives, margin) for user in users]
        num_filled = sum(filled for _, filled in chosen)
        with atomic_folder(folder, lock.check) as new:
            write_table(
                new, [pool for pool, _ in chosen], shards.manifest_hash, "mine", settings, num_filled=num_filled
            )
    num_kept = sum(int(pool.sum()) for pool, _ in chosen)
    show(f"{folder}: {num_kept} candidates of {len(chosen)} train users stay, {num_filled} of them above the margin")
    return 0


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
