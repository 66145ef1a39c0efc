"""All that can be checked before a GPU is touched, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from trsr_dist.bases import BaseName, base_folder
from trsr_dist.config import Config
from trsr_dist.config.zero import find_file, read_zero_config
from trsr_dist.distributed import device_of, on_rank_zero, once_per_node
from trsr_dist.environment import Ranks
from trsr_dist.errors import ConfigError
from trsr_dist.evaluate.evaluation import model_identity
from trsr_dist.log import get_logger
from trsr_dist.model.artifacts import base_fingerprint, follow
from trsr_dist.model.loading import resolve_precision, shared_backend
from trsr_dist.model.zero3 import check_equal_calls
from trsr_dist.planner.memory import ZeroSetting
from trsr_dist.pretrained import BaseSource, load_config, load_tokenizer
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import RANKING_LOSSES
from trsr_dist.run import RUN, RunFolder
from trsr_dist.shards.cache import open_cache
from trsr_dist.shards.measure import Share
from trsr_dist.shards.plan import PackingSettings
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.steps import StreamState
from trsr_dist.shards.stream import TrainStream
from trsr_dist.shards.tables import MINED, CandidateTable, open_table, scores_folder
from trsr_dist.train.checkpoints import Checkpoint
from trsr_dist.train.engine import complete_zero_config, zero_setting
from trsr_dist.train.start import InitialAdapter, read_initial
from trsr_dist.train.validation import Validator

log = get_logger("train")


@dataclass(frozen=True)
class Prepared:
    """What the builders need."""

    source: BaseSource
    """The base, in a local folder."""
    name: str
    """Of the base as it is recorded: a path or a hub id."""
    fingerprint: str
    """Of the base, on rank 0's node."""
    initial: InitialAdapter | None
    """None where the adapter is a fresh one, or the checkpoint's."""
    model_config: PretrainedConfig
    builder: PromptBuilder
    tokenizer: Any
    stream: TrainStream
    validator: Validator | None
    """None where the run never ranks the validation users."""
    num_steps: int
    zero: ZeroSetting
    zero_config: dict[str, Any]
    precision: str
    backend: str | None
    """Of the shared-prefix attention."""

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


def prepare(config: Config, run: RunFolder, ranks: Ranks, checkpoint: Checkpoint | None) -> Prepared:
    """Check config, model folder, shards and checkpoint against each other; plan the steps. All ranks call it.

    Raises:
        ConfigError: settings that contradict each other or the data.
        ModelError: the base or its tokenizer cannot be read.
        DataError: the shards are missing or damaged.
        CheckpointError: the checkpoint belongs to other data or settings.
    """
    train = config.train
    if ranks.world_size > train.rows_per_step:
        raise ConfigError(
            f"{ranks.world_size} ranks share train.rows_per_step={train.rows_per_step} rows, so that some would have "
            "nothing to do; raise train.rows_per_step or take fewer ranks"
        )
    settings = read_zero_config(find_file(train.deepspeed_config))
    source, name = base_source(config, run, ranks)
    tokenizer, model_config = load_tokenizer(source), load_config(source)
    builder = PromptBuilder(tokenizer, **config.prompt.model_dump())
    precision = resolve_precision(train.precision, device_of(ranks))
    device = device_of(ranks)
    backend = shared_backend(
        model_config, config.model.attention, device, getattr(torch, precision), builder.max_tokens
    )
    rows_per_rank = -(-train.rows_per_step // ranks.world_size)
    zero_config = complete_zero_config(
        settings, rows_per_rank, ranks.world_size, precision, train.max_grad_norm, device.type == "cuda"
    )
    zero = zero_setting(zero_config)
    if zero.stage == 3:
        if config.model.quantization != "none":
            raise ConfigError(
                f"model.quantization={config.model.quantization} and ZeRO stage 3 exclude each other: quantized "
                "weights cannot be divided; take ds_configs/zero1.json"
            )
        check_equal_calls(backend, ranks.world_size)
    validator = open_validator(config, run, ranks, builder)
    stream = open_stream(config, run, ranks, builder, checkpoint)
    check_loss(train.loss, backend, stream, train.row_tokens)
    fingerprint = on_rank_zero(lambda: base_fingerprint(source.name_or_path))
    initial = None
    if train.init_adapter and checkpoint is None:
        initial = read_initial(run.resolve(train.init_adapter), config.lora.model_dump(), source, fingerprint)
    return Prepared(
        source=source,
        name=name,
        fingerprint=fingerprint,
        initial=initial,
        model_config=model_config,
        builder=builder,
        tokenizer=tokenizer,
        stream=stream,
        validator=validator,
        num_steps=count_steps(stream, train.num_epochs, train.max_steps),
        zero=zero,
        zero_config=zero_config,
        precision=precision,
        backend=backend,
    )


def base_source(config: Config, run: RunFolder, ranks: Ranks) -> tuple[BaseSource, str]:
    """The base in a local folder (one of the hub is fetched by one rank of each node), and its recorded name.

    Raises:
        ConfigError: no base is named.
        ModelError: it is not here and not on the hub.
    """
    if not config.model.name_or_path:
        raise ConfigError("model.name_or_path is empty: name a base model's folder or hub id")
    name = run.resolve(config.model.name_or_path)
    base = BaseName(name, config.model.revision, "")
    remedy = "set model.name_or_path to the folder or hub id of a model"
    if config.model.name_or_path.startswith(RUN):
        remedy = f"make it with tools/make_tiny_base.py, or {remedy}"
    with_code = config.model.trust_remote_code
    if not Path(name).is_dir():
        log.info("base %s: looking for it in the hub's cache, else on the hub", name)
    once_per_node(lambda: base_folder(base, None, remedy, with_code), ranks)
    folder = str(base_folder(base, None, remedy, with_code))
    return BaseSource(folder, "", with_code, config.model.quantization), name


def packing_settings(config: Config) -> PackingSettings:
    """What the rows depend on."""
    train = config.train
    return PackingSettings(train.row_tokens, train.rows_per_step, train.negatives_per_positive, config.run.seed)


def open_stream(
    config: Config, run: RunFolder, ranks: Ranks, builder: PromptBuilder, checkpoint: Checkpoint | None
) -> TrainStream:
    """The train split's stream, from where the checkpoint stands."""
    train = config.train
    shards = ShardSet(run.split("train"), open_cache(train.cache_dir, train.cache_gb), url=train.shards_url)
    return TrainStream(
        shards,
        builder,
        packing_settings(config),
        Share(ranks.rank, ranks.world_size, train.num_workers),
        train.max_data_errors if train.data_errors == "skip" else None,
        None if checkpoint is None else StreamState.from_dict(checkpoint.state.stream),
        open_teacher(config, run, shards) if train.loss == "distill" else None,
        open_pool(shards, train.negatives_per_positive) if train.pool == "mined" else None,
    )


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
    name = str(follow(Path(run.resolve(config.train.teacher))))
    remedy = f"run tools/score_shards.py with this config and --model {config.train.teacher}"
    teacher = open_table(
        scores_folder(shards.folder, model_identity(name, config.model.revision)), shards.manifest_hash, remedy
    )
    if teacher.manifest["trained_on_these_shards"] is False:
        log.warning(
            "train.teacher=%s was trained on other shards: what it says may tell of the valid and test users", name
        )
    return teacher


def open_validator(config: Config, run: RunFolder, ranks: Ranks, builder: PromptBuilder) -> Validator | None:
    """The validation split's users, None where the run never ranks them.

    Raises:
        DataError: the split is missing, empty or damaged.
    """
    train, evaluate = config.train, config.evaluate
    if not train.evaluate_every_steps:
        return None
    return Validator(
        ShardSet(run.split("valid")),
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
