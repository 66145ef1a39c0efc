"""Checkpoint folders: complete or absent, verified when written and when read, the newest good one found.

step-000100/  adapter/ (PEFT)  optimizer.safetensors  state.json  provenance.json  manifest.json
latest, best  text files that name a complete folder
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trsr_dist.bases import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from trsr_dist.errors import CheckpointError, DataError
from trsr_dist.files import (
    atomic_file,
    atomic_folder,
    explain,
    read_json,
    recover_folder,
    remove_folder,
    sha256_of,
    write_json,
)
from trsr_dist.log import get_logger
from trsr_dist.model.adapters import adapter_name, parameter_name
from trsr_dist.model.artifacts import POINTERS, PROVENANCE, CheckpointManifest, changed_file, write_tensors
from trsr_dist.run import MANIFEST, read_manifest

WEIGHTS = f"adapter/{ADAPTER_WEIGHTS}"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
NAME = re.compile(r"step-(\d{6,})$")

log = get_logger("checkpoint")


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Where a run stands: everything but tensors."""

    step: int
    """Optimizer steps made, skipped ones included."""
    adam_step: int
    """Steps that changed the weights."""
    stream: dict[str, Any]
    """Of the last step trained (``StreamState``)."""
    best_value: float | None = None
    """Of ``train.best_metric`` so far."""
    best_step: int = 0
    num_bad_evaluations: int = 0
    """Evaluations in a row without a better value."""
    awaits_validation: bool = False
    """The validation that is due at this step has not been made."""
    validation: dict[str, Any] | None = None
    """What the best value depends on: metric, users."""
    skipped_steps: int = 0
    data_errors: int = 0
    """Damaged samples that were left out."""
    seconds: float = 0.0
    """Of training, over all starts."""
    settings: dict[str, Any] | None = None
    """What losses depend on beside the stream: schedule, loss, optimizer, LoRA."""

    def validated(self, value: float) -> TrainerState:
        """After a validation at this step."""
        if self.best_value is None or value > self.best_value:
            found = {"best_value": value, "best_step": self.step, "num_bad_evaluations": 0}
        else:
            found = {"num_bad_evaluations": self.num_bad_evaluations + 1}
        return replace(self, awaits_validation=False, **found)

    def under(self, validation: dict[str, Any]) -> TrainerState:
        """Under another metric or other users nothing is the best yet."""
        if self.validation in (None, validation):
            return replace(self, validation=validation)
        return replace(self, validation=validation, best_value=None, best_step=0, num_bad_evaluations=0)

    def has_lost_patience(self, patience: int) -> bool:
        """Whether `patience` validations in a row were no better (0: never)."""
        return bool(patience) and self.num_bad_evaluations >= patience

    def is_over(self, num_steps: int, patience: int) -> bool:
        """Whether all steps are made, or the patience is lost."""
        return self.step >= num_steps or self.has_lost_patience(patience)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    folder: Path
    tensors: dict[str, torch.Tensor]
    """By ``weight/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME``; float32."""
    state: TrainerState
    provenance: dict[str, Any]
    digest: str
    """SHA-256 of the manifest, and so of all files."""


class CheckpointFolder:
    """``RUN/checkpoints``.

    Args:
        root: the folder.
        keep: recent checkpoints that stay, beside the best.
        fence: raises where this process may no longer publish (``locks.FolderLock.check``).
    """

    def __init__(self, root: Path, keep: int, fence: Callable[[], None] | None = None) -> None:
        self.root = root
        self._keep = keep
        self.fence = fence

    def save(
        self,
        tensors: dict[str, torch.Tensor],
        state: TrainerState,
        adapter_config: dict[str, Any],
        provenance: dict[str, Any],
    ) -> Path:
        """Write a checkpoint whole, read it back, then point ``latest`` to it and remove old ones.

        Raises:
            CheckpointError: what was read back is not what was written, or a tensor is not finite.
            RunError: this process has lost the folder to another one.
        """
        folder = self._folder(state.step)
        with atomic_folder(folder, self.fence) as target:
            (target / "adapter").mkdir()
            weights = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
            adapter = {adapter_name(name): tensor.contiguous() for name, tensor in weights.items()}
            write_tensors(adapter, target / WEIGHTS)
            moments = {k: v.contiguous() for k, v in tensors.items() if not k.startswith("weight/")}
            write_tensors(moments, target / OPTIMIZER)
            write_json(target / "adapter" / ADAPTER_CONFIG, adapter_config)
            write_json(target / STATE, asdict(state))
            write_json(target / PROVENANCE, provenance)
            files = sorted(path for path in target.rglob("*") if path.is_file())
            listed = {
                str(path.relative_to(target)): {"size": path.stat().st_size, "sha256": sha256_of(path)}
                for path in files
            }
            write_json(target / MANIFEST, {"files": listed})
            read = read_checkpoint(target).tensors
            if read.keys() != tensors.keys() or not all(torch.equal(read[name], tensors[name]) for name in read):
                raise CheckpointError(f"{target}: read back, it is not what was written; check the disk")
        self.point("latest", folder)
        self._remove_old(folder)
        return folder

    def mark_best(self, step: int) -> None:
        """Make ``best`` name this step's checkpoint, if that is there."""
        folder = self._folder(step)
        if folder.is_dir():
            self.point("best", folder)

    def resume_at(self, checkpoint: Checkpoint) -> None:
        """Have ``latest`` and ``best`` say what this checkpoint does: a kill may have come before they were written, or
        newer ones are damaged."""
        self.point("latest", checkpoint.folder)
        self.mark_best(checkpoint.state.best_step)
        if self._best() in {folder.name for folder in self._later(checkpoint.folder)}:
            (self.root / "best").unlink()

    def forget_best(self) -> None:
        """No checkpoint is the best: none was validated by the metric and on the users of now."""
        if name := self._best():
            log.info("%s was the best by another metric or other users; none is until the next validation", name)
            (self.root / "best").unlink()

    def point(self, name: str, folder: Path) -> None:
        """Make ``latest`` or ``best`` name a checkpoint."""
        with atomic_file(self.root / name) as stream:
            stream.write(folder.name + "\n")

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are skipped with a warning.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be read.
            RunError: the disk refuses to read one.
        """
        folders = self._folders()[::-1]
        for folder in folders:
            try:
                return read_checkpoint(folder)
            except CheckpointError as error:
                log.warning("%s; falling back to the checkpoint before it", error)
        if folders:
            raise CheckpointError(f"{self.root}: none of {len(folders)} checkpoints can be read; move them away")
        return None

    def clear(self) -> None:
        """Remove all checkpoints.

        Raises:
            RunError: this process has lost the folder to another one.
        """
        if self.fence is not None:
            self.fence()
        for name in POINTERS:
            (self.root / name).unlink(missing_ok=True)
        for folder in self._folders():
            remove_folder(folder)

    def tidy(self, dead: str = "") -> None:
        """Make the folder, and clean up what killed processes left in it. Call while holding its lock.

        Args:
            dead: signature of the owner that the lock was taken from; empty where there was none.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for name in {left.name[1:].partition(".")[0] for left in self.root.glob(".step-*")}:
            recover_folder(self.root / name, dead)

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step:06d}"

    def _best(self) -> str:
        """Name of the best checkpoint's folder; empty where none is marked."""
        path = self.root / "best"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    def _remove_old(self, saved: Path) -> None:
        later, kept = self._later(saved), self._best()
        if later and self.fence is not None:
            self.fence()  # they may be those of a start that has taken this one's place
        old = [folder for folder in self._folders() if folder not in later][: -self._keep]
        for folder in (*old, *later):
            if folder.name != kept:
                remove_folder(folder)

    def _later(self, folder: Path) -> list[Path]:
        """Those of later steps: a training that goes on from this one has found them damaged."""
        return [other for other in self._folders() if _step_of(other) > _step_of(folder)]

    def _folders(self) -> list[Path]:
        """By their step, which may have more digits than the names are padded to."""
        named = (path for path in self.root.glob("step-*") if NAME.match(path.name))
        return sorted(filter(Path.is_dir, named), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check every file.

    Raises:
        CheckpointError: incomplete, damaged, or with tensors that are empty or not finite.
        RunError: the disk refuses to read a file, which may be whole.
    """
    try:
        if path := changed_file(folder, read_manifest(folder, CheckpointManifest)["files"]):
            raise CheckpointError(f"{path}: missing, truncated or changed since it was written")
        adapter = load_file(folder / WEIGHTS)
        tensors = {f"weight/{parameter_name(name)}": tensor for name, tensor in adapter.items()}
        tensors |= load_file(folder / OPTIMIZER)
        state = read_json(folder / STATE, TrainerState)
        provenance, digest = read_json(folder / PROVENANCE), sha256_of(folder / MANIFEST)
    except (DataError, KeyError, TypeError, FileNotFoundError, NotADirectoryError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint ({error})") from None
    except OSError as error:
        raise explain(error, folder) from None  # going on from an older one would throw work away
    for name, tensor in tensors.items():
        if not tensor.numel() or not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {name} is empty or not finite")
    return Checkpoint(folder, tensors, state, provenance, digest)
