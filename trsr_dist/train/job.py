"""The training stage: from config and shards to checkpoints, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trsr_dist import distributed
from trsr_dist.cli import EXIT_REQUEUE
from trsr_dist.config import Config, dump_config
from trsr_dist.environment import Ranks, detect_ranks
from trsr_dist.errors import TrsrError
from trsr_dist.files import writing
from trsr_dist.locks import FolderLock, folder_lock
from trsr_dist.log import get_logger, setup_logging
from trsr_dist.run import RunFolder
from trsr_dist.train.build import build_trainer, first_state, resume_settings
from trsr_dist.train.checkpoints import CheckpointFolder
from trsr_dist.train.lifecycle import (
    Heartbeat,
    StopReasons,
    StopSignals,
    check_stop_file,
    describe_ranks,
    follow_launcher,
    walltime_of,
)
from trsr_dist.train.prepare import prepare
from trsr_dist.train.start import check_base, check_finished, check_settings, newest_for_all
from trsr_dist.train.trainer import Control, Ending

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
    signals = StopSignals()
    heartbeat = Heartbeat(run.root, ranks, config.train.hang_seconds)
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
    prepared = prepare(config, run, ranks, checkpoint)
    settings, marks = resume_settings(config, prepared.num_steps)
    state = first_state(config, run, prepared, checkpoint, settings)
    if checkpoint is not None:
        check_base(checkpoint, prepared.name, prepared.fingerprint)
        is_validated = prepared.validator is None or not state.awaits_validation
        if is_validated and state.is_over(prepared.num_steps, config.train.early_stopping_patience):
            check_finished(checkpoint, settings)
            distributed.on_rank_zero(lambda: run.write_config("train", dump_config(config), only_missing=True))
            log.info("%s: finished; nothing to do (--force redoes it)", checkpoint.folder)
            return Ending(True, "")
        check_settings(checkpoint, settings, marks)
    trainer = build_trainer(config, run, ranks, prepared, checkpoints, checkpoint, state, control)
    distributed.on_rank_zero(lambda: _begin(config, run, checkpoints, state.best_step, force))
    ending = trainer.run()
    _say_ending(ending, trainer.state.step, prepared.num_steps)
    return ending


def _begin(config: Config, run: RunFolder, checkpoints: CheckpointFolder, best_step: int, force: bool) -> None:
    """Only now, when all is checked and loaded, is anything of an earlier training replaced."""
    if force:
        checkpoints.clear()
    run.write_config("train", dump_config(config))
    if best_step:
        checkpoints.mark_best(best_step)  # a kill may have come between the checkpoint and its mark


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
