"""All that can be checked before a GPU is touched, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsr_dist.config import Config
from trsr_dist.distributed import on_rank_zero
from trsr_dist.environment import Ranks
from trsr_dist.errors import CheckpointError, ConfigError, DataError, ModelError
from trsr_dist.log import get_logger
from trsr_dist.model.artifacts import base_fingerprint, follow, model_identity
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import RANKING_LOSSES
from trsr_dist.run import RunFolder
from trsr_dist.shards.cache import open_cache
from trsr_dist.shards.lengths import Lengths
from trsr_dist.shards.measure import Share
from trsr_dist.shards.plan import PackingSettings
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.steps import StreamState
from trsr_dist.shards.stream import TrainStream
from trsr_dist.shards.tables import MINED, CandidateTable, open_table, scores_folder
from trsr_dist.train.checkpoints import Checkpoint
from trsr_dist.train.model import ModelSetup, set_up_model
from trsr_dist.train.start import InitialAdapter, read_by_all, read_initial
from trsr_dist.train.validation import Validator

FIRST_SAMPLES = 64
"""That tell how many negatives the samples keep."""

log = get_logger("train")


@dataclass(frozen=True)
class Prepared:
    """What the builders need."""

    model: ModelSetup
    fingerprint: str
    """Of the base, the same on all nodes."""
    initial: InitialAdapter | None
    """None where the adapter is a fresh one, or the checkpoint's."""
    stream: TrainStream
    validator: Validator | None
    """None where the run never ranks the validation users."""
    num_steps: int

    @property
    def decided(self) -> dict[str, Any]:
        """What losses depend on and the config does not say; the teacher by its scores."""
        teacher = "" if self.stream.teacher is None else self.stream.teacher.sha256[:12]
        return {"steps": self.num_steps, "train.precision": self.model.precision, "train.teacher": teacher}


def prepare(config: Config, run: RunFolder, ranks: Ranks, checkpoint: Checkpoint | None) -> Prepared:
    """Check config, model folder, shards and checkpoint against each other; plan the steps. All ranks call it.

    Raises:
        ConfigError: settings that contradict each other or the data.
        ModelError: the base or its tokenizer cannot be read, or is another one on some node.
        DataError: the shards are missing or damaged, or others on some node.
        CheckpointError: the checkpoint belongs to other data or settings.
    """
    train = config.train
    if ranks.world_size > train.rows_per_step:
        raise ConfigError(
            f"{ranks.world_size} ranks share train.rows_per_step={train.rows_per_step} rows, so that some would have "
            "nothing to do; raise train.rows_per_step or take fewer ranks"
        )
    model = set_up_model(config, run, ranks)
    validator = open_validator(config, run, ranks, model.builder)
    stream = open_stream(config, run, ranks, model.builder, checkpoint)
    check_loss(train.loss, model.backend, stream, train.row_tokens)
    fingerprint = read_by_all(
        lambda: base_fingerprint(model.source.name_or_path),
        lambda found: f"fingerprint {found[:12]}...",
        f"the base {model.name}",
        "give all nodes the same files: pin model.revision, or name a folder on storage that they share",
        ModelError,
    )
    initial = None
    if train.init_adapter and checkpoint is None:
        place = run.resolve(train.init_adapter)
        initial = read_by_all(  # a run that still trains moves its pointers
            lambda: read_initial(place, config.lora.model_dump(), model.source, fingerprint),
            lambda found: f"SHA-256 {found.digest[:12]}... in {found.folder}",
            "the adapter to start from",
            "name a step-* folder on storage that all nodes share with train.init_adapter",
            ModelError,
        )
    num_steps = count_steps(stream, train.num_epochs, train.max_steps)
    return Prepared(model, fingerprint, initial, stream, validator, num_steps)


def packing_settings(config: Config) -> PackingSettings:
    """What the rows depend on."""
    train = config.train
    return PackingSettings(train.row_tokens, train.rows_per_step, train.negatives_per_positive, config.run.seed)


def open_stream(
    config: Config, run: RunFolder, ranks: Ranks, builder: PromptBuilder, checkpoint: Checkpoint | None
) -> TrainStream:
    """The train split's stream, from where the checkpoint stands.

    Raises:
        CheckpointError: the checkpoint belongs to other data or settings.
        DataError: the ranks find different shards, or would make different rows of them.
        ConfigError: the samples keep fewer negatives than are to be drawn.
    """
    train = config.train
    shards = ShardSet(run.split("train"), open_cache(train.cache_dir, train.cache_gb), url=train.shards_url)
    check_same(shards, f"manifest {shards.manifest_hash[:12]}... and prompts of {builder.fingerprint}")
    try:
        stream = TrainStream(
            shards,
            builder,
            packing_settings(config),
            Share(ranks.rank, ranks.world_size, train.num_workers),
            train.max_data_errors if train.data_errors == "skip" else None,
            None if checkpoint is None else StreamState.from_dict(checkpoint.state.stream),
            open_teacher(config, run, shards) if train.loss == "distill" else None,
            open_pool(shards, train.negatives_per_positive) if train.pool == "mined" else None,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from None
    if checkpoint is None and train.pool == "all":
        check_negatives(stream.plan.lengths, train.negatives_per_positive)
    teacher = "none" if stream.teacher is None else f"{stream.teacher.sha256[:12]}..."
    check_same(shards, f"rows of plan {stream.plan.identity} and teacher {teacher}")
    return stream


def check_negatives(lengths: Lengths, wanted: int) -> None:
    """A few users may have less to draw from, where the items were few; not the first ones taken together. Shards
    without any negative were made so.

    Raises:
        ConfigError: less is drawn than the provenance would say.
    """
    labels = lengths.table([(0, min(FIRST_SAMPLES, lengths.facts.num_samples))]).labels
    kept = int((~labels).sum()) // max(int(labels.sum()), 1)
    if 0 < kept < wanted:
        raise ConfigError(
            f"train.negatives_per_positive={wanted}: the samples of {lengths.shards.folder} keep {kept} a positive; "
            "lower it, or prepare again with this value"
        )


def check_same(shards: ShardSet, found: str) -> None:
    """Ranks that read other files would learn from other rows, and none would fail. All ranks call it.

    Args:
        shards: of a split.
        found: says what this rank has found there.

    Raises:
        DataError: another rank has found something else; all ranks raise it.
    """
    remedy = "let all nodes see the same files there, and equal tokenizers"
    read_by_all(lambda: found, str, str(shards.folder), remedy, DataError)


def open_pool(shards: ShardSet, negatives_per_positive: int) -> CandidateTable:
    """Which negatives are hard.

    Raises:
        RunError: none were mined for these shards.
        ConfigError: fewer stay than are drawn.
        DataError: the table is damaged.
    """
    pool = open_table(shards.folder / MINED, shards.manifest_hash, "run tools/mine_negatives.py with this config")
    num_kept = pool.manifest["settings"]["negatives_per_positive"]
    if num_kept < negatives_per_positive:
        raise ConfigError(
            f"train.negatives_per_positive={negatives_per_positive}: {shards.folder / MINED} keeps {num_kept} per "
            "positive; lower the former, or mine again with --negatives"
        )
    return pool


def open_teacher(config: Config, run: RunFolder, shards: ShardSet) -> CandidateTable:
    """What the teacher says of the train users' candidates.

    Raises:
        RunError: it has not scored these shards.
        DataError: its scores are damaged.
    """
    name = on_rank_zero(lambda: str(follow(Path(run.resolve(config.train.teacher)))))
    remedy = f"run tools/score_shards.py with this config and --model {config.train.teacher}"
    teacher = open_table(
        scores_folder(shards.folder, model_identity(name, config.model.revision)), shards.manifest_hash, remedy
    )
    if teacher.manifest["trained_on_these_shards"] is False:
        log.info(
            "train.teacher=%s was trained on other shards: what it says may tell of the valid and test users", name
        )
    return teacher


def open_validator(config: Config, run: RunFolder, ranks: Ranks, builder: PromptBuilder) -> Validator | None:
    """The validation split's users, None where the run never ranks them.

    Raises:
        DataError: the split is missing, empty or damaged, or another one on some node.
    """
    train, evaluate = config.train, config.evaluate
    if not train.evaluate_every_steps:
        return None
    shards = ShardSet(run.split("valid"))
    check_same(shards, f"manifest {shards.manifest_hash[:12]}...")
    return Validator(
        shards,
        builder,
        evaluate.row_tokens,
        train.evaluate_users,
        evaluate.top_k,
        ranks,
        leave_out=train.data_errors == "skip",
    )


def check_loss(loss: str, backend: str | None, stream: TrainStream, row_tokens: int) -> None:
    """Some losses need all of a user's candidates in one row, or shared prefixes.

    Raises:
        ConfigError: they cannot be had.
    """
    if loss == "full_text" and backend is None:
        raise ConfigError("train.loss=full_text needs shared prefixes, which this model cannot have; use answer")
    longest = stream.plan.lengths.facts.longest_unit
    if loss in RANKING_LOSSES and longest > row_tokens:
        raise ConfigError(
            f"train.loss={loss} compares a user's candidates, so they must share a row: the longest user has {longest} "
            f"tokens, train.row_tokens is {row_tokens}; raise it, or lower train.pool_size or prompt.max_tokens"
        )


def count_steps(stream: TrainStream, num_epochs: float, max_steps: int) -> int:
    """Optimizer steps of the whole training: exact, by planning each epoch."""
    if max_steps:
        return max_steps
    whole, part = int(num_epochs), num_epochs - int(num_epochs)
    steps = sum(stream.steps_in_epoch(epoch) for epoch in range(whole))
    return steps + (max(1, round(part * stream.steps_in_epoch(whole))) if part else 0)
