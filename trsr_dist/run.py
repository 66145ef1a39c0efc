"""The run folder: names and stage manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trsr_dist import __version__
from trsr_dist.errors import RunError
from trsr_dist.files import atomic_file, read_json, sha256_of, write_json

MANIFEST = "manifest.json"
SPLITS = ("train", "valid", "test")
RUN = "RUN/"
"""What names of folders of the run begin with, in settings."""
REMEDY = "use another run.dir, or --force to make it again"


class RunFolder:
    """Where each stage of a run keeps its files (the layout is a contract with scripts and users)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw = root / "raw"
        self.histories = root / "histories"
        self.base = root / "base"
        self.summaries = root / "summaries"
        self.shards = root / "shards"
        self.samples = root / "samples"
        self.checkpoints = root / "checkpoints"
        self.merged = root / "merged"
        self.evaluation = root / "evaluation"

    def split(self, name: str) -> Path:
        """Shard folder of ``train``, ``valid`` or ``test``."""
        return self.shards / name

    def sample(self, number: int) -> RunFolder:
        """Holds one sampled summary of each train user (``summarize.samples``); made from this run's histories."""
        folder = RunFolder(self.samples / f"{number:03d}")
        folder.histories = self.histories
        return folder

    def resolve(self, name_or_path: str) -> str:
        """``RUN/base`` and the like stand for folders of this run; anything else is left as it is."""
        return str(self.root / name_or_path[len(RUN) :]) if name_or_path.startswith(RUN) else name_or_path

    def write_config(self, stage: str, text: str, only_missing: bool = False) -> None:
        """Keep the resolved config of a stage that ran; one that finds its work done writes it where it is missing."""
        path = self.root / "config" / f"{stage}.yaml"
        if only_missing and path.is_file():
            return
        with atomic_file(path) as stream:
            stream.write(text)


def beside(shards: Path, name: str) -> Path | None:
    """A finished folder of the run that ``shards`` or one of its splits belongs to, by its name in the run."""
    found = (up / name for up in shards.resolve().parents[:2])
    return next((path for path in found if (path / MANIFEST).is_file()), None)


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
    """What every stage's manifest may hold, beside its own facts."""

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


def is_finished(
    folder: Path, settings: dict[str, Any], inputs: dict[str, str], force: bool = False, replace: bool = False
) -> bool:
    """Whether ``folder`` already holds this stage's output for these settings and inputs.

    Args:
        folder: of the output.
        settings: of the stage.
        inputs: their hashes.
        force: make again what is there.
        replace: what was made of something else gives way.

    Raises:
        RunError: it holds the output of other settings or inputs, or files that no stage of this run wrote, and nothing
            says ``replace``.
    """
    if force or not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        if not (folder / MANIFEST).is_file():
            raise RunError(
                f"{folder}: holds files but no {MANIFEST}, so it is not this run's; use another run.dir or --force"
            )
        manifest = read_manifest(folder)
        _compare(folder, "settings", manifest.get("settings", {}), json.loads(json.dumps(settings)))
        _compare(folder, "inputs", manifest.get("inputs", {}), inputs)
    except RunError:
        if replace:
            return False
        raise
    return True


def check_inputs(folder: Path, inputs: dict[str, str], remedy: str = REMEDY) -> None:
    """Refuse input that has changed since ``folder`` was made from it.

    Raises:
        RunError: names the input and both hashes; ``remedy`` ends the message.
    """
    _compare(folder, "inputs", read_manifest(folder).get("inputs", {}), inputs, remedy)


def _compare(folder: Path, kind: str, recorded: dict[str, Any], current: dict[str, Any], remedy: str = REMEDY) -> None:
    for key in sorted(recorded.keys() | current.keys()):
        if recorded.get(key) != current.get(key):
            raise RunError(
                f"{folder}: made with {kind[:-1]} {key}={recorded.get(key)!r}, now {current.get(key)!r}; {remedy}"
            )
