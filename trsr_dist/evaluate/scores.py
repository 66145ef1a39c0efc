"""Scores on disk: the part files of one pass, which restarts reuse.

{folder}/identity.json      what the scores depend on: hashes of shards and model, prompt settings, sizes
{folder}/part-000000.jsonl  the users of one part, see score_files
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trsr_dist.errors import DataError, RunError
from trsr_dist.evaluate.coverage import Expected, align
from trsr_dist.evaluate.parts import split_parts
from trsr_dist.evaluate.score_files import UserScores, read_scores, write_scores
from trsr_dist.files import read_json, write_json

IDENTITY = "identity.json"
FACTS = ("num_users", "name")
"""What is recorded beside the identity: users of the pass, and the model's folder. Scores do not depend on them."""


class ScoreFolder:
    """The part files of one pass over a split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._identity: dict[str, Any] | None = None

    def open(self, identity: dict[str, Any], num_users: int, name: str) -> None:
        """Take up a folder for these inputs, or begin it. From then on it must stay theirs.

        Args:
            identity: what the scores depend on.
            num_users: of the pass.
            name: of the model.

        Raises:
            RunError: it holds scores of other shards, another model or other settings.
        """
        self._identity = json.loads(json.dumps(identity))
        # Parts are looked for first: another task may write the identity, then parts, between two looks.
        has_parts = self.folder.is_dir() and any(self.folder.glob("part-*"))
        if (self.folder / IDENTITY).is_file():
            self.check()
        elif has_parts:
            raise RunError(
                f"{self.folder}: holds scores but no {IDENTITY}, so whose they are is unknown; use another --output, "
                "or --force to score anew"
            )
        else:
            write_json(self.folder / IDENTITY, self._identity | dict(zip(FACTS, (num_users, name), strict=True)))

    def check(self) -> None:
        """The folder must still be that of the inputs it was opened for.

        Raises:
            RunError: it is another evaluation's.
        """
        if self._identity is None:
            return
        recorded = self.recorded()
        for key in sorted((recorded.keys() | self._identity.keys()) - set(FACTS)):
            if recorded.get(key) != self._identity.get(key):
                raise RunError(
                    f"{self.folder}: holds scores made with {key}={recorded.get(key)!r}, now "
                    f"{self._identity.get(key)!r}; use another --output, or --force to score anew"
                )

    def recorded(self) -> dict[str, Any]:
        """Identity and facts that stand in the folder; empty where none do."""
        return read_json(self.folder / IDENTITY) if (self.folder / IDENTITY).is_file() else {}

    def clear(self) -> None:
        """Remove parts and identity; the identity last, so that a kill in between leaves no unknown scores."""
        for path in [*sorted(self.folder.glob("part-*.jsonl")), self.folder / IDENTITY]:
            path.unlink(missing_ok=True)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.jsonl"

    def has(self, part: int) -> bool:
        """Whether the part is complete: files appear whole or not at all."""
        return self.path(part).is_file()

    def missing(self, num_users: int) -> list[int]:
        """Parts that nobody has scored yet."""
        return [part for part in range(len(split_parts(num_users))) if not self.has(part)]

    def write(self, part: int, users: Sequence[UserScores]) -> None:
        """Publish a part.

        Raises:
            RunError: the folder has become another evaluation's.
        """
        self.check()
        write_scores(self.path(part), users)

    def read(self, part: int, expected: Sequence[Expected]) -> list[UserScores]:
        """The scores of a part, in the order of its samples and their candidates.

        Raises:
            DataError: they do not cover the part exactly.
        """
        return align(self.path(part), expected, read_scores(self.path(part)))

    def users(self) -> Iterator[UserScores]:
        """The users of all parts that are there, in order."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            yield from read_scores(path)

    def check_names(self, num_users: int) -> None:
        """Refuse files that are no parts of so many users.

        Raises:
            DataError: names one.
        """
        num_parts = len(split_parts(num_users))
        known = {self.path(part).name for part in range(num_parts)}
        unknown = sorted({path.name for path in self.folder.glob("part-*")} - known)
        if unknown:
            raise DataError(
                f"{self.folder / unknown[0]}: no part of this evaluation, which has {num_parts} of {num_users} users; "
                "remove the file"
            )
