"""Going on from a checkpoint: which one all ranks take, and whether this run may."""

from __future__ import annotations

from typing import Any

from trsr_dist.distributed import gather_objects, on_rank_zero
from trsr_dist.errors import CheckpointError, RunError
from trsr_dist.log import get_logger
from trsr_dist.train.checkpoints import Checkpoint, CheckpointFolder, read_checkpoint

FIXED = ("lora.r", "lora.alpha", "lora.use_rslora", "lora.target_modules", "train.init_adapter")
"""Settings that give the weights of a checkpoint their meaning, or their start."""

log = get_logger("train")


def newest_for_all(checkpoints: CheckpointFolder) -> Checkpoint | None:
    """The newest whole checkpoint: rank 0 chooses it, all ranks read that one. All ranks call it.

    Raises:
        CheckpointError: a rank cannot read it, or finds another one in its place; all ranks raise it.
    """

    def choose() -> Any:
        newest = checkpoints.newest()
        return None if newest is None else newest.folder

    folder = on_rank_zero(choose)
    if folder is None:
        return None
    found, error = None, ""
    try:
        found = read_checkpoint(folder)
    except CheckpointError as problem:
        error = str(problem)
    everywhere = gather_objects((error, "" if found is None else f"step {found.state.step}, manifest {found.digest}"))
    for rank, (error, content) in enumerate(everywhere):
        if error:
            raise CheckpointError(f"rank {rank} cannot read the checkpoint that rank 0 has chosen: {error}")
        if content != everywhere[0][1]:
            raise CheckpointError(
                f"{folder}: rank {rank} finds {content}, rank 0 {everywhere[0][1]}; run.dir must lie on storage that "
                "all nodes share"
            )
    return found


def check_base(checkpoint: Checkpoint, name: str, fingerprint: str) -> None:
    """The base must be the one that the checkpoint was trained on.

    Raises:
        CheckpointError: names both.
    """
    recorded = checkpoint.provenance.get("base", {})
    if recorded.get("fingerprint", fingerprint) != fingerprint:
        raise CheckpointError(
            f"{checkpoint.folder}: trained on base {recorded.get('name_or_path')!r} with fingerprint "
            f"{recorded['fingerprint'][:12]}..., model.name_or_path={name!r} has {fingerprint[:12]}...; name or "
            "restore that base, use another run.dir, or --force to train anew"
        )


def check_settings(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Say what has changed since the checkpoint was made.

    Raises:
        CheckpointError: a setting that must not change.
    """
    for key, before, now in _changes(checkpoint, settings):
        if key in FIXED:
            raise CheckpointError(
                f"{checkpoint.folder}: made with {key}={before!r}, now {now!r}, which its weights do not fit; go on "
                "with the former, use another run.dir, or --force to train anew"
            )
        log.warning("%s was %r up to step %d, now it is %r", key, before, checkpoint.state.step, now)


def check_finished(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """A finished training that is left alone must be the one that was asked for.

    Raises:
        RunError: names the first setting that differs.
    """
    for key, before, now in _changes(checkpoint, settings):
        raise RunError(
            f"{checkpoint.folder}: this finished training was made with {key}={before!r}, now {now!r}; use another "
            "run.dir, --force to train anew, or a larger train.max_steps or train.num_epochs to go on"
        )


def _changes(checkpoint: Checkpoint, settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    recorded = checkpoint.state.settings or {}
    return [(key, recorded[key], now) for key, now in settings.items() if recorded.get(key, now) != now]
