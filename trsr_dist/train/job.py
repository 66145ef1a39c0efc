"""The training stage: from config and shards to checkpoints, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trsr_dist import distributed
from trsr_dist.cli import EXIT_REQUEUE
from trsr_dist.config import Config, dump_config
from trsr_dist.environment import Ranks, detect_ranks
from trsr_dist.errors import TrsrError
from trsr_dist.files import writing
from trsr_dist.locks import FolderLock, folder_lock
from trsr_dist.log import get_logger, setup_logging
from trsr_dist.run import RunFolder, manifest_hash
from trsr_dist.trackers import open_metrics
from trsr_dist.train.checkpoints import Checkpoint, CheckpointFolder, TrainerState
from trsr_dist.train.elastic import Saving, restore_state, start_from
from trsr_dist.train.engine import Engine
from trsr_dist.train.lifecycle import (
    Heartbeat,
    StopReasons,
    StopSignals,
    check_stop_file,
    describe_ranks,
    follow_launcher,
    walltime_of,
)
from trsr_dist.train.losses import LossSettings
from trsr_dist.train.model import build_model, flops_counter, peak_flops
from trsr_dist.train.monitor import Monitor
from trsr_dist.train.prepare import Prepared, prepare
from trsr_dist.train.start import check_base, check_finished, check_settings, newest_for_all, resume_settings
from trsr_dist.train.step import StepRunner
from trsr_dist.train.trainer import Control, Ending, LoopSettings, Trainer

log = get_logger("train")


def train(config: Config, force: bool = False) -> int:
    """Run the stage; see launch/train.py.

    Args:
        config: of the run.
        force: start from scratch; earlier checkpoints of the run are removed.

    Returns:
        0 when all steps are made, ``EXIT_REQUEUE`` when the training was interrupted and saved.

    Raises:
        TrsrError: what a user can fix; all ranks raise it.
    """
    ranks = detect_ranks()
    setup_logging(ranks.rank, "train")
    run = RunFolder(Path(config.run.dir))
    if ranks.source != "single":  # started by hand it outlives its shell, as nohup wants it
        follow_launcher()
    heartbeat = Heartbeat(run.root, ranks, config.train.hang_seconds)
    signals = StopSignals(heartbeat.is_starting)
    reasons = StopReasons(run.root, signals, walltime_of(config.train.walltime_seconds), ranks.is_main)
    with (
        writing(run.root),
        heartbeat,
        _named_failures(run, ranks),
        distributed.process_group(ranks, config.train.timeout_seconds, always=True),
        _locked(run, ranks) as lock,
    ):
        ending = _train(config, run, ranks, Control(reasons, heartbeat), lock, force)
    return 0 if ending.is_complete else EXIT_REQUEUE


def _train(
    config: Config, run: RunFolder, ranks: Ranks, control: Control, lock: FolderLock | None, force: bool
) -> Ending:
    distributed.on_rank_zero(lambda: check_stop_file(run.root))
    checkpoints = CheckpointFolder(run.checkpoints, config.train.keep_checkpoints, lock.check if lock else None)
    distributed.on_rank_zero(lambda: checkpoints.tidy(lock.lease.former if lock else ""))
    checkpoint = None if force else newest_for_all(checkpoints)
    distributed.on_rank_zero(lambda: checkpoint and checkpoints.resume_at(checkpoint))
    prepared = prepare(config, run, ranks, checkpoint)
    settings, marks = resume_settings(config, prepared.decided)
    state = first_state(config, run, prepared, checkpoint, settings)
    if checkpoint is not None:
        check_base(checkpoint, prepared.model.name, prepared.fingerprint)
        is_auto = config.train.precision == "auto"  # on another machine it may be another one
        is_validated = prepared.validator is None or not state.awaits_validation
        patience = config.train.early_stopping_patience
        if is_validated and state.is_over(prepared.num_steps, patience):
            check_finished(checkpoint, settings, patience, leave_out="train.precision" if is_auto else "")
            distributed.on_rank_zero(lambda: run.write_config("train", dump_config(config), only_missing=True))
            log.info("%s: finished; nothing to do (--force redoes it)", checkpoint.folder)
            return Ending(True, "")
        check_settings(checkpoint, settings, marks)
    trainer = build_trainer(config, run, ranks, prepared, checkpoints, checkpoint, state, control)
    distributed.on_rank_zero(lambda: _begin(config, run, checkpoints, state, force))
    ending = trainer.run()
    _say_ending(ending, trainer.state.step, prepared.num_steps)
    return ending


def first_state(
    config: Config, run: RunFolder, prepared: Prepared, checkpoint: Checkpoint | None, settings: dict[str, Any]
) -> TrainerState:
    """Where to go on, under this run's settings."""
    start = TrainerState(0, 0, {}) if checkpoint is None else checkpoint.state
    state = replace(start, settings=settings)
    if prepared.validator is None:
        return state
    valid = manifest_hash(run.split("valid"))
    return state.under({"metric": config.train.best_metric, "users": prepared.validator.num_users, "shards": valid})


def build_trainer(
    config: Config,
    run: RunFolder,
    ranks: Ranks,
    prepared: Prepared,
    checkpoints: CheckpointFolder,
    checkpoint: Checkpoint | None,
    state: TrainerState,
    control: Control,
) -> Trainer:
    """The loop, ready to run. All ranks call it.

    Args:
        config: of the run.
        run: its folder.
        ranks: this process.
        prepared: checked and planned.
        checkpoints: where the loop saves.
        checkpoint: to go on from; None: a new training.
        state: of ``first_state``.
        control: what watches over this rank.
    """
    train = config.train
    model, adapter = build_model(config, ranks, prepared.model)
    engine = Engine(model, prepared.model.zero_config, train.weight_decay, train.adam_betas)
    _restore(engine, prepared, checkpoint)
    saving = Saving(engine, checkpoints, adapter, _provenance(config, prepared, checkpoint))
    metrics = None
    if ranks.is_main:
        redone = "valid/" if state.awaits_validation else None
        metrics = open_metrics(config, run.root, "train", state.step + 1, checkpoints.fence, redone)
    monitor = Monitor(
        metrics,
        prepared.num_steps,
        state.step,
        train.log_every_steps,
        flops_counter(prepared.model.config, engine, train.loss == "full_text"),
        peak_flops(ranks.world_size, prepared.model.precision),
    )
    answer_ids = prepared.model.builder.answer_ids
    loss = LossSettings(train.loss, answer_ids, train.row_tokens, train.teacher_weight, train.teacher_temperature)
    runner = StepRunner(engine, loss, config.run.seed, control.heartbeat)
    return Trainer(
        engine, prepared.stream, runner, _loop_settings(config, prepared), saving, prepared.validator, state, monitor,
        control,
    )  # fmt: skip


def _restore(engine: Engine, prepared: Prepared, checkpoint: Checkpoint | None) -> None:
    """The checkpoint's weights and moments, or those of an earlier training's adapter."""
    if checkpoint is not None:
        restore_state(engine, checkpoint.tensors, checkpoint.state.adam_step)
        log.info("resumed from %s", checkpoint.folder)
    elif prepared.initial is not None:
        start_from(engine, prepared.initial.weights)
        log.info("starts from %s", prepared.initial.folder)


def _loop_settings(config: Config, prepared: Prepared) -> LoopSettings:
    train = config.train
    return LoopSettings(
        num_steps=prepared.num_steps,
        learning_rate=train.learning_rate,
        warmup_ratio=train.warmup_ratio,
        schedule=train.schedule,
        save_every_steps=train.save_every_steps,
        evaluate_every_steps=train.evaluate_every_steps,
        best_metric=train.best_metric,
        early_stopping_patience=train.early_stopping_patience,
        max_bad_steps=train.max_bad_steps,
    )


def _provenance(
    config: Config, prepared: Prepared, checkpoint: Checkpoint | None
) -> Callable[[TrainerState], dict[str, Any]]:
    """From a state to what a later stage must know of its checkpoint; kept with it and with the merged model."""
    train, initial = config.train, prepared.initial
    origin: dict[str, str] = {}
    if checkpoint is not None:
        origin = checkpoint.provenance.get("init_adapter", {})
    elif initial is not None:
        origin = {"folder": str(initial.folder), "sha256": initial.digest}
    teacher = {} if prepared.stream.teacher is None else {"teacher": prepared.stream.teacher.manifest}
    base = {"name_or_path": prepared.model.name, "revision": config.model.revision, "fingerprint": prepared.fingerprint}

    def describe(state: TrainerState) -> dict[str, Any]:
        return {
            "base": base,
            "init_adapter": origin,
            "prompt": prepared.model.builder.settings,
            "answer_ids": list(prepared.model.builder.answer_ids),
            "domain": config.domain,
            "shards": {"train": state.stream["shards"]},
            **teacher,
            "train": {
                "step": state.step,
                "num_steps": prepared.num_steps,
                "loss": train.loss,
                "negatives_per_positive": train.negatives_per_positive,
                "learning_rate": train.learning_rate,
                "precision": prepared.model.precision,
                "zero_stage": prepared.model.zero.stage,
                "best_value": state.best_value,
                "seed": config.run.seed,
            },
            "config": config.model_dump(mode="json"),
        }

    return describe


def _begin(config: Config, run: RunFolder, checkpoints: CheckpointFolder, state: TrainerState, force: bool) -> None:
    """Only now, when all is checked and loaded, is anything of an earlier training replaced."""
    if force:
        checkpoints.clear()
    if not state.best_step:
        checkpoints.forget_best()
    run.write_config("train", dump_config(config))


def _say_ending(ending: Ending, step: int, num_steps: int) -> None:
    verb = "finished" if ending.is_complete else "interrupted, saved"
    because = f": {ending.reason}" if ending.reason else ""
    log.info("%s after %d of %d steps%s", verb, step, num_steps, because)
    if not ending.is_complete:
        log.info("all is saved, run it again to go on; launchers call the exit status %d an error", EXIT_REQUEUE)


@contextmanager
def _locked(run: RunFolder, ranks: Ranks) -> Iterator[FolderLock | None]:
    """Rank 0 holds the checkpoints' folder; when it cannot, all ranks raise why."""
    locks: list[FolderLock] = []
    with ExitStack() as stack:
        distributed.on_rank_zero(lambda: locks.append(stack.enter_context(folder_lock(run.checkpoints))))
        yield locks[0] if ranks.is_main else None


@contextmanager
def _named_failures(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Say which rank was where when a collective fails: a rank has died or is stuck."""
    try:
        yield
    except TrsrError:
        raise
    except RuntimeError:
        if ranks.world_size > 1:
            log.error("a rank has failed; where all ranks were:\n%s", describe_ranks(run.root / "heartbeats"))
        raise
