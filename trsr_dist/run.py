"""The run folder: names, stage manifests, locks."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsr_dist import __version__
from trsr_dist.environment import detect_ranks, process_start
from trsr_dist.errors import RunError
from trsr_dist.files import atomic_file, read_json, read_text, sha256_of, write_json

MANIFEST = "manifest.json"
RUN = "RUN/"
"""What names of folders of the run begin with, in settings."""
LOCK_BEAT_SECONDS = 10.0
LOCK_STALE_SECONDS = 120.0
LOCK_READS = 10
"""Tries, a second apart, to read a lock on a disk that fails."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where each stage of a run keeps its files (the layout is a contract with scripts and users)."""

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    @property
    def histories(self) -> Path:
        return self.root / "histories"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def summaries(self) -> Path:
        return self.root / "summaries"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    def split(self, name: str) -> Path:
        """Shard folder of ``train``, ``valid`` or ``test``."""
        return self.shards / name

    def resolve(self, name_or_path: str) -> str:
        """``RUN/base`` and the like stand for folders of this run; anything else is left as it is."""
        return str(self.root / name_or_path[len(RUN) :]) if name_or_path.startswith(RUN) else name_or_path

    def write_config(self, stage: str, text: str) -> None:
        """Keep the resolved config of a stage that ran."""
        with atomic_file(self.root / "config" / f"{stage}.yaml") as stream:
            stream.write(text)


def manifest_hash(folder: Path) -> str:
    """Hash by which later stages know this output.

    Raises:
        RunError: the folder has no manifest: the stage that writes it has not finished.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder}: no {MANIFEST}; run the stage that writes this folder first")
    return sha256_of(path)


def write_manifest(folder: Path, stage: str, settings: dict[str, Any], inputs: dict[str, str], **facts: Any) -> None:
    """Record what a stage read, how it was set and what it wrote. No times: equal work gives equal bytes."""
    value = {"stage": stage, "version": __version__, "settings": settings, "inputs": inputs, **facts}
    write_json(folder / MANIFEST, json.loads(json.dumps(value)))


def is_finished(folder: Path, settings: dict[str, Any], inputs: dict[str, str], force: bool = False) -> bool:
    """Whether ``folder`` already holds this stage's output for these settings and inputs.

    Raises:
        RunError: it holds the output of other settings or inputs, or files that no stage of this run wrote.
    """
    if force or not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / MANIFEST).is_file():
        raise RunError(
            f"{folder}: holds files but no {MANIFEST}, so it is not this run's; use another run.dir or --force"
        )
    manifest = read_json(folder / MANIFEST)
    _compare(folder, "settings", manifest.get("settings", {}), json.loads(json.dumps(settings)))
    _compare(folder, "inputs", manifest.get("inputs", {}), inputs)
    return True


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Refuse input that has changed since ``folder`` was made from it.

    Raises:
        RunError: names the input and both hashes.
    """
    _compare(folder, "inputs", read_json(folder / MANIFEST).get("inputs", {}), inputs)


def _compare(folder: Path, kind: str, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    for key in sorted(recorded.keys() | current.keys()):
        if recorded.get(key) != current.get(key):
            raise RunError(
                f"{folder}: made with {kind[:-1]} {key}={recorded.get(key)!r}, now {current.get(key)!r}; "
                "use another run.dir, or --force to make it anew"
            )


@dataclass(frozen=True, slots=True)
class FolderLock:
    """A lock that this process has taken; another may have taken it over since."""

    path: Path

    def check(self) -> None:
        """Call right before anything is published.

        Raises:
            RunError: the lock is lost: this process was cut off and its work is done elsewhere.
        """
        holder = _holder_patiently(self.path)
        if holder != _myself():
            raise RunError(f"{self.path}: lost to {holder or 'nobody'}; nothing was published")


@contextmanager
def folder_lock(folder: Path) -> Iterator[FolderLock]:
    """Hold ``folder`` for writing against other jobs, on any node.

    The lock is a file created with O_EXCL beside the folder (safe on NFS) and touched every few seconds. It is taken
    over from a holder that has died, and from an earlier start of the same Slurm job: that one may live on behind a
    broken network, and finds the lock lost in ``FolderLock.check``.

    Raises:
        RunError: another live process holds it; names host and pid.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    _acquire(path)
    stop = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield FolderLock(path)
    finally:
        stop.set()
        beat.join()
        if _holder(path) == _myself():
            path.unlink(missing_ok=True)


def _acquire(path: Path) -> None:
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            _remove_if_stale(path)
            continue
        with os.fdopen(descriptor, "w") as stream:
            json.dump(_myself(), stream)
        return
    raise RunError(f"{path}: another process has just taken this lock; wait for it to end")


def _myself() -> dict[str, Any]:
    ranks, pid = detect_ranks(), os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": process_start(pid),
        "job": ranks.job_id,
        "restart": ranks.restart,
    }


def _holder(path: Path) -> dict[str, Any]:
    try:
        return json.loads(read_text(path) or "{}")
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _holder_patiently(path: Path) -> dict[str, Any]:
    """A shared disk that fails for a moment must not end a job that holds its lock."""
    for _ in range(LOCK_READS - 1):
        with suppress(OSError):
            return _holder(path)
        time.sleep(1.0)
    return _holder(path)


def _remove_if_stale(path: Path) -> None:
    holder = _holder(path)
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    if not _is_fenced(holder) and age < LOCK_STALE_SECONDS:
        raise RunError(
            f"{path}: held by pid {holder.get('pid')} on {holder.get('host')} ({age:.0f} s since its last sign of "
            "life); wait for it to end, or remove the file if that process is gone"
        )
    _take_away(path, holder)


def _is_fenced(holder: dict[str, Any]) -> bool:
    """Whether the holder is dead, or an earlier start of this very job."""
    me = _myself()
    if holder.get("host") == me["host"] and process_start(holder.get("pid", 0)) != holder.get("started"):
        return True
    return bool(me["job"]) and holder.get("job") == me["job"] and holder.get("restart", 0) < me["restart"]


def _take_away(path: Path, holder: dict[str, Any]) -> None:
    """Remove a stale lock, inside a lock of its own: of many that saw it stale, none may remove its successor."""
    guard = path.with_name(f"{path.name}.takeover")
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        raise RunError(
            f"{guard}: another process is taking over {path.name}; try again, or remove both if none is running"
        ) from None
    try:
        if _holder(path) == holder:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink()


def _keep_alive(path: Path, stop: threading.Event) -> None:
    while not stop.wait(LOCK_BEAT_SECONDS):
        with suppress(OSError):  # a shared disk that fails for a moment must not end the beats
            if _holder(path) != _myself():
                return
            os.utime(path)
