"""A model's log-odds for all candidates and pool items of the train users: what distillation, mining and the choice of
summaries read.

RUN/shards/train/scores-{model}-{shards}/
    identity.json, part-*.jsonl   as in an evaluation: parts that a restart uses again
    table.npy, manifest.json      all of them by sample and candidate, once no part is missing

No other split is ever scored here: a student that saw what a teacher says of a test user would have seen the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trsr_dist import distributed
from trsr_dist.config import Config
from trsr_dist.environment import Ranks, array_task, detect_ranks
from trsr_dist.evaluate.evaluation import Evaluation, trained_on_these_shards
from trsr_dist.evaluate.passes import ScoringPass, split_parts
from trsr_dist.evaluate.score import WAIT_SECONDS, claim_folder, clear_folder, complete, open_models, score_everything
from trsr_dist.evaluate.score_files import ScoreFolder, UserScores, expected_of
from trsr_dist.evaluate.users import SplitUsers
from trsr_dist.files import writing
from trsr_dist.locks import Claim
from trsr_dist.log import get_logger, setup_logging, show
from trsr_dist.model.artifacts import follow, model_identity
from trsr_dist.run import MANIFEST, RunFolder
from trsr_dist.shards.cache import open_cache
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.tables import scores_folder, write_table

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


def scored_users(shards: ShardSet, folder: ScoreFolder) -> Iterator[UserScores]:
    """The scores of all samples, in order.

    Raises:
        DataError: they do not cover the shards exactly.
    """
    folder.check_names(len(shards))
    for number, part in enumerate(split_parts(len(shards))):
        yield from folder.read(number, [expected_of(shards.read(index)) for index in part])


def _publish(job: TrainScoring, shards: ShardSet, folder: ScoreFolder, trained_here: bool | None) -> None:
    missing = folder.missing(len(shards))
    if missing and array_task()[1] > 1:
        log.info("left to other tasks: %d parts; the last task to finish completes the scores", len(missing))
        return
    if not (job.folder / MANIFEST).is_file():
        rows = [user.scores for user in scored_users(shards, folder)]
        write_table(
            job.folder, rows, shards.manifest_hash, "score", folder.recorded(), trained_on_these_shards=trained_here
        )
    show(f"scores of {len(shards)} train users: {job.folder}")
