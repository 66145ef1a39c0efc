"""From planned units to packed rows: read, tokenize, lay out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trsr_dist.errors import DataError
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import PackedRow, pack_row
from trsr_dist.shards.plan import Unit
from trsr_dist.shards.reader import ShardSet


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads and tokenizes the units of rows."""

    shards: ShardSet
    builder: PromptBuilder

    def read_row(self, units: Sequence[Unit]) -> tuple[PackedRow, list[str]]:
        """The row, and what was wrong with the units that it lacks; a row without units is empty."""
        tokenized, errors = [], []
        for unit in units:
            try:
                tokenized.append(self.tokenize(unit))
            except DataError as error:
                errors.append(str(error))
        return pack_row(tokenized), errors

    def tokenize(self, unit: Unit) -> TokenizedUser:
        """The user with the unit's candidates, exactly as planned.

        Only these candidates are decoded and tokenized, unless the user's trimming depends on the others too.

        Raises:
            DataError: the sample is damaged, or its lengths are not the measured ones.
        """
        if unit.trimmed:
            user = self.builder.build(self.shards.read(unit.sample)).choose(unit.candidates)
        else:
            user = split_at(self.builder.build(self.shards.read(unit.sample, unit.candidates)), unit.prefix)
        if len(user.prefix) != unit.prefix or tuple(map(len, user.suffixes)) != unit.suffixes:
            raise DataError(
                f"{self.shards.folder}: sample {unit.sample} has other token lengths than were measured; remove the "
                "folder's lengths-* and start again"
            )
        return user


def split_at(user: TokenizedUser, length: int) -> TokenizedUser:
    """The same prompts with a prefix of at most ``length`` tokens; what is beyond moves to each suffix."""
    rest = user.prefix[length:]
    return replace(user, prefix=user.prefix[:length], suffixes=tuple(rest + suffix for suffix in user.suffixes))
