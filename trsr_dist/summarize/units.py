"""Units of work and their commit: a unit is a range of a split's users and becomes one shard.

A unit is committed by renaming its attempt's folder, which fails where a committed one stands: the first commit counts,
whoever wakes up late. When all units are committed, their files move into one folder that takes its public name last.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trsr_dist.errors import DataError
from trsr_dist.files import is_first, read_json, remove_folder, replace_folder, sync_path, write_json
from trsr_dist.records import Sample
from trsr_dist.run import MANIFEST
from trsr_dist.shards.manifest import ShardFacts, write_split_manifest
from trsr_dist.shards.writer import write_shard

FACTS = "facts.json"


class Failed(TypedDict):
    """A user without a summary."""

    user: str
    node: int
    """Position of the failed request in the user's plan."""
    key: str
    reason: str


class UnitFacts(TypedDict):
    """What a committed unit holds."""

    shard: ShardFacts
    num_users: int
    failed: list[Failed]
    counts: dict[str, int]


class SplitWork:
    """The units of one split under one set of settings.

    Args:
        folder: work folder of the split; its name holds a hash of the settings, so that different ones never mix.
        split: ``train``, ``valid`` or ``test``.
        num_users: users of the split.
        users_per_unit: users of a unit; the last one may have fewer.
    """

    def __init__(self, folder: Path, split: str, num_users: int, users_per_unit: int) -> None:
        self.folder = folder
        self.split = split
        self.num_users = num_users
        self.users_per_unit = users_per_unit
        self.num_units = -(-num_users // users_per_unit)
        self._done: set[int] = set()
        self._is_gone = False
        self._listed = float("-inf")
        self._failed: dict[int, list[dict[str, Any]]] = {}

    def open(self) -> None:
        """Make the work folder, or find the one that earlier tasks have begun."""
        for part in ("units", "attempts"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)

    def users(self, unit: int) -> range:
        """Positions of the unit's users in the split."""
        first = unit * self.users_per_unit
        return range(first, min(first + self.users_per_unit, self.num_users))

    def is_done(self, unit: int) -> bool:
        """Whether the unit is committed, by anyone; in a folder that is gone, since its set is published, all are."""
        if unit not in self._done and ((self._unit(unit) / FACTS).is_file() or not self.folder.exists()):
            self._done.add(unit)
        return unit in self._done

    def committed(self, max_age_seconds: float = 0.0) -> AbstractSet[int]:
        """All units known to be committed, by one look into the folder, which is at most so old."""
        now = time.monotonic()
        if not self._is_gone and now - self._listed >= max_age_seconds:
            self._listed = now
            try:
                with os.scandir(self.folder / "units") as entries:  # renamed as a whole, so that the name says it all
                    self._done.update(int(entry.name) for entry in entries if entry.name.isdecimal())
            except FileNotFoundError:
                if not self.folder.exists():
                    self._is_gone = True
                    self._done.update(range(self.num_units))
        return self._done

    def is_complete(self) -> bool:
        missing = next((unit for unit in range(self.num_units) if unit not in self._done), None)
        return missing is None or (self.is_done(missing) and len(self.committed()) == self.num_units)

    def facts(self, unit: int) -> UnitFacts:
        """What a committed unit holds.

        Raises:
            DataError: it is damaged, or gone: the set has been published and the work folder removed.
        """
        return read_json(self._unit(unit) / FACTS, UnitFacts)

    def failures(self, max_age_seconds: float = 0.0) -> list[dict[str, Any]]:
        """Users without a summary in all committed units: user, node, key, reason. A unit is read once."""
        unread = self.committed(max_age_seconds) - self._failed.keys()
        for unit in () if self._is_gone else unread:
            with suppress(DataError):  # the set has just been published and the folder removed
                self._failed[unit] = self.facts(unit)["failed"]
        return [failure for unit in sorted(self._failed) for failure in self._failed[unit]]

    def commit(self, unit: int, samples: Iterable[Sample], facts: dict[str, Any], task: str) -> bool:
        """Write a unit's shard and make it count.

        Returns:
            False where another task's already counts, or where the work folder is gone: others have published the set.
        """
        attempt = self.folder / "attempts" / f"{unit:06d}-{task}"
        try:
            attempt.mkdir()
            shard = write_shard(attempt / f"{self.split}-{unit:06d}.tar", samples)
            write_json(attempt / FACTS, {"shard": asdict(shard), **facts})
            was_free = is_first(lambda: os.rename(attempt, self._unit(unit)))
            sync_path(self._unit(unit).parent)
            self._done.add(unit)
            return was_free
        except FileNotFoundError:
            if self.folder.exists():
                raise
            return False
        finally:
            shutil.rmtree(attempt, ignore_errors=True)

    def publish(self, target: Path, task: str, settings: dict[str, Any], inputs: dict[str, str], **facts: Any) -> bool:
        """Give the complete set its public name, in one rename.

        Each publisher links the files into its own set, so that two at once, or one that was killed, do no harm.

        Args:
            target: ``RUN/shards/{split}``; an older set there is replaced.
            task: this task's name.
            settings: for the manifest.
            inputs: for the manifest.
            **facts: for the manifest.

        Returns:
            False where another task was faster.
        """
        whole = self.folder / f"set-{task}"
        try:
            whole.mkdir()
            for unit in range(self.num_units):
                for path in sorted(self._unit(unit).iterdir()):
                    if path.name != FACTS:
                        link_or_copy(path, whole / path.name)
            shards = [self.facts(unit)["shard"] for unit in range(self.num_units)]
            write_split_manifest(whole, shards, settings, inputs, **facts)
            target.parent.mkdir(parents=True, exist_ok=True)
            return is_first(lambda: replace_folder(whole, target))
        except FileNotFoundError:
            if (target / MANIFEST).is_file():
                return False
            raise
        finally:
            shutil.rmtree(whole, ignore_errors=True)

    def clear(self) -> None:
        """After publishing: remove the work folder, in one step, so that no half of it is ever taken up again."""
        with suppress(FileNotFoundError):
            remove_folder(self.folder)

    def _unit(self, unit: int) -> Path:
        return self.folder / "units" / f"{unit:06d}"


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target)
