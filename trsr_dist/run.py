"""The run folder: names, stage manifests, locks and claims."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trsr_dist import __version__
from trsr_dist.environment import detect_ranks, process_start
from trsr_dist.errors import DataError, RunError
from trsr_dist.files import atomic_file, read_json, read_text, sha256_of, write_json
from trsr_dist.json_text import parse_json

MANIFEST = "manifest.json"
RUN = "RUN/"
"""What names of folders of the run begin with, in settings."""
ANEW = "use another run.dir, or --force to make it anew"
LOCK_BEAT_SECONDS = 10.0
LOCK_STALE_SECONDS = 120.0
LOCK_READS = 10
"""Tries, a second apart, to read a lock on a disk that fails."""
CLAIMS = ".claims"


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


class Manifest(TypedDict, total=False):
    """What every stage's manifest may hold, beside facts of its own."""

    __pydantic_config__ = {"extra": "allow"}
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]


def read_manifest(folder: Path, form: type = Manifest) -> dict[str, Any]:
    """The manifest of a folder.

    Args:
        folder: that a stage wrote.
        form: of a stage that keeps more in it.

    Raises:
        DataError: missing, damaged or of another form.
    """
    return read_json(folder / MANIFEST, form)


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
    manifest = read_manifest(folder)
    _compare(folder, "settings", manifest.get("settings", {}), json.loads(json.dumps(settings)))
    _compare(folder, "inputs", manifest.get("inputs", {}), inputs)
    return True


def check_inputs(folder: Path, inputs: dict[str, str], remedy: str = ANEW) -> None:
    """Refuse input that has changed since ``folder`` was made from it.

    Raises:
        RunError: names the input and both hashes; ``remedy`` ends the message.
    """
    _compare(folder, "inputs", read_manifest(folder).get("inputs", {}), inputs, remedy)


def _compare(folder: Path, kind: str, recorded: dict[str, Any], current: dict[str, Any], remedy: str = ANEW) -> None:
    for key in sorted(recorded.keys() | current.keys()):
        if recorded.get(key) != current.get(key):
            raise RunError(
                f"{folder}: made with {kind[:-1]} {key}={recorded.get(key)!r}, now {current.get(key)!r}; {remedy}"
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

    def is_mine() -> bool:
        return _holder(path) == _myself()

    try:
        with _beating(path, is_mine):
            yield FolderLock(path)
    finally:
        if is_mine():
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
        return parse_json(read_text(path))
    except (FileNotFoundError, UnicodeDecodeError, DataError):  # an empty one: it is being written
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


@contextmanager
def _beating(path: Path, is_mine: Callable[[], bool]) -> Iterator[None]:
    """Touch a file every few seconds within this context."""
    stop = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(path, is_mine, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()


def _keep_alive(path: Path, is_mine: Callable[[], bool], stop: threading.Event) -> None:
    while not stop.wait(LOCK_BEAT_SECONDS):
        with suppress(OSError):  # a shared disk that fails for a moment must not end the beats
            if not is_mine():
                return
            os.utime(path)


@dataclass(frozen=True, slots=True)
class Claim:
    """This process among all that are at work on a folder."""

    path: Path
    since: int
    """Nanoseconds, by the file server's clock."""

    def check_alone(self) -> None:
        """Call before removing what others may be writing.

        Raises:
            RunError: another live process is at work here, with whatever settings.
        """
        for _, claim in self._others():
            raise RunError(
                f"{self.path.parent.parent}: {_describe(claim)} is at work here too, and its files would be removed; "
                "wait for it or cancel it"
            )

    def check_settings(self, what: dict[str, Any]) -> None:
        """Refuse to begin where other settings are at work.

        Raises:
            RunError: an older claim has another digest.
        """
        digest = self.path.name.partition("-")[0]
        for name, claim in self._others():
            # At equal times neither is sure of having been seen by the other: both go.
            if name.partition("-")[0] == digest or claim["since"] > self.since:
                continue
            theirs, mine = claim.get("what", {}), json.loads(json.dumps(what))
            key = next((key for key in sorted(theirs | mine) if theirs.get(key) != mine.get(key)), "digest")
            raise RunError(
                f"{self.path.parent.parent}: {_describe(claim)} is at work here with {key}={theirs.get(key)!r}, now "
                f"{mine.get(key)!r}; wait for it, cancel it, or use another --output or run.dir"
            )

    def _others(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and content of the other live claims; dead ones are removed."""
        if not self.path.exists():
            raise RunError(f"{self.path}: lost after too long without a sign of life; run the stage again")
        now = self.path.stat().st_mtime_ns
        for path in sorted(self.path.parent.glob("[!.]*")):
            if path == self.path:
                continue
            try:
                touched = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            claim = {"since": touched} | _holder(path)
            if now - touched > LOCK_STALE_SECONDS * 1e9 or _is_fenced(claim):
                path.unlink(missing_ok=True)
            else:
                yield path.name, claim


@contextmanager
def claim(folder: Path, digest: str, what: dict[str, Any]) -> Iterator[Claim]:
    """Work on ``folder`` together with others of the same settings, and keep those of other settings out.

    A process first registers (a file in ``folder/.claims``, touched every few seconds), then looks round: of two with
    different digests the later one finds the earlier. A claim ends with its process, as a lock does.

    Args:
        folder: what is worked on; made where it is not there.
        digest: of settings and inputs; equal ones (ranks, tasks of an array) share the folder.
        what: settings and inputs by name, for the message.

    Raises:
        RunError: a live process with another digest was here first; names it and what differs.
    """
    path = folder / CLAIMS / f"{digest[:12]}-{socket.gethostname()}-{os.getpid()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of a dead process with this number
    try:
        # Digest and time are seen from the first moment on; the content takes the file's place as a whole.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        entry = Claim(path, path.stat().st_mtime_ns)
        write_json(path, {**_myself(), "since": entry.since, "what": what})
        with _beating(path, lambda: True):
            entry.check_settings(what)
            yield entry
    finally:
        path.unlink(missing_ok=True)


def _describe(claim: dict[str, Any]) -> str:
    job = f", Slurm job {claim['job']}" if claim.get("job") else ""
    return f"another job (pid {claim.get('pid')} on {claim.get('host')}{job})"
