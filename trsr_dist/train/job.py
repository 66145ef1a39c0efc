"""The training stage: from config and shards to checkpoints, on any number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trsr_dist import distributed
from trsr_dist.cli import EXIT_REQUEUE
from trsr_dist.config import Config, dump_config
from trsr_dist.environment import Ranks, detect_ranks
from trsr_dist.errors import TrsrError
from trsr_dist.files import writing
from trsr_dist.log import get_logger, setup_logging
from trsr_dist.run import FolderLock, RunFolder, folder_lock
from trsr_dist.train.build import Build
from trsr_dist.train.checkpoints import CheckpointFolder
from trsr_dist.train.heartbeat import Heartbeat, describe_ranks
from trsr_dist.train.launcher import follow_launcher
from trsr_dist.train.prepare import Prepared, prepare
from trsr_dist.train.stopping import StopReasons, StopSignals, check_stop_file, walltime_of
from trsr_dist.train.trainer import Control, Ending

STUCK_FACTOR = 2.0
"""A rank ends itself after so many times the collectives' timeout without progress."""

log = get_logger("train")


def train(config: Config, force: bool = False) -> int:
    """Run the stage; see launch/train.py.

    Args:
        config: of the run.
        force: start anew; earlier checkpoints of the run are removed.

    Returns:
        0 when all steps are made, ``EXIT_REQUEUE`` when the training was interrupted and saved.

    Raises:
        TrsrError: what a user can mend; all ranks raise it.
    """
    ranks = detect_ranks()
    setup_logging(ranks.rank, "train")
    run = RunFolder(Path(config.run.dir))
    follow_launcher()
    signals = StopSignals()
    heartbeat = Heartbeat(run.root, ranks, STUCK_FACTOR * config.train.timeout_seconds)
    reasons = StopReasons(run.root, signals, walltime_of(config.train.walltime_seconds), ranks.is_main)
    with writing(run.root):
        heartbeat.start()
        with (
            _named_failures(run, ranks),
            distributed.process_group(ranks, config.train.timeout_seconds, always=True),
            _locked(run, ranks) as lock,
        ):
            ending = _train(config, run, ranks, Control(reasons, heartbeat), lock, force)
        heartbeat.stop()
    return 0 if ending.is_complete else EXIT_REQUEUE


def _train(
    config: Config, run: RunFolder, ranks: Ranks, control: Control, lock: FolderLock | None, force: bool
) -> Ending:
    distributed.on_rank_zero(lambda: check_stop_file(run.root))
    checkpoints = CheckpointFolder(run.checkpoints, config.train.keep_checkpoints, lock.check if lock else None)
    if ranks.is_main:
        checkpoints.tidy()
        if force:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.write_config("train", dump_config(config))
    distributed.barrier()
    checkpoint = checkpoints.newest()
    prepared = prepare(config, run, ranks, checkpoint)
    if checkpoint is not None and checkpoint.state.step >= prepared.num_steps:
        log.info("%s: all %d steps are made; nothing to do (--force redoes it)", checkpoint.folder, prepared.num_steps)
        return Ending(True, "")
    return _run(Build(config, run, ranks, prepared, checkpoints, checkpoint, control), prepared)


def _run(build: Build, prepared: Prepared) -> Ending:
    trainer = build.trainer()
    ending = trainer.run()
    build.close(trainer.state)
    verb = "finished" if ending.is_complete else "interrupted, saved"
    log.info("%s after %d of %d steps%s", verb, trainer.state.step, prepared.num_steps, _because(ending.reason))
    return ending


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


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
