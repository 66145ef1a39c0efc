"""What the plan hands to readers, and they to the training: units, steps, and where a stream stands. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from trsr_dist.errors import CheckpointError
from trsr_dist.rows import PackedRow


@dataclass(frozen=True, slots=True)
class Unit:
    """A user's prefix with some of the user's candidates: what a row holds whole."""

    sample: int
    """Number of the sample in the split."""
    prefix: int
    """Tokens of the prefix."""
    trimmed: bool
    """Parts common to all candidates were cut, so all candidates are needed to write the prompts again."""
    candidates: tuple[int, ...]
    """Numbers of the candidates in the sample."""
    suffixes: tuple[int, ...]
    """Tokens of each candidate's suffix."""


POSITION = ("epoch", "window", "row", "step")
"""Fields of a stream's state that say where it stands; all others must stay equal when a training goes on."""
MADE_OF = {
    "shards": "the train split, which data.* and summarize.* decide: restore it",
    "prompt": "prompt.* and the base's tokenizer (model.name_or_path): take them as they were",
    "plan": "train.pool, the negatives that tools/mine_negatives.py left in it, the samples left out under "
    "train.data_errors, or this package's version: take them as they were",
    "row_tokens": "train.row_tokens: set it so again",
    "rows_per_step": "train.rows_per_step: set it so again",
    "negatives_per_positive": "train.negatives_per_positive: set it so again",
    "seed": "run.seed: set it so again",
}
"""What decides each of these other fields, and the remedy."""


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where the stream stands after a step, and what its steps depend on. Keep that of the last step *trained*."""

    epoch: int
    window: int
    row: int
    """The next row of the window."""
    step: int
    """Steps made, over all epochs."""
    shards: str
    """Manifest hash of the split."""
    prompt: str
    """Fingerprint of tokenizer and prompt style."""
    plan: str
    """Identity of the plan: token lengths and rules of packing."""
    row_tokens: int
    rows_per_step: int
    negatives_per_positive: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> StreamState:
        """
        Raises:
            CheckpointError: the fields are not these.
        """
        try:
            # Checkpoints of before hold the teacher's hash, which changes no rows.
            return cls(**{name: found for name, found in value.items() if name != "teacher"})
        except TypeError as error:
            raise CheckpointError(
                f"the checkpoint's stream was saved by another version of this package ({error}); go on with that "
                "version, or start a new run"
            ) from None

    def check(self, start: StreamState) -> None:
        """Refuse to go on with other data or settings: the rows would be others.

        Raises:
            CheckpointError: names the first difference.
        """
        for name in (field.name for field in fields(self) if field.name not in POSITION):
            saved, now = getattr(self, name), getattr(start, name)
            if saved != now:
                raise CheckpointError(
                    f"the checkpoint's stream has {name}={saved!r}, this run {now!r}: its rows would be others. "
                    f"That comes from {MADE_OF[name]}, use another run.dir, or --force to train from the start"
                )


@dataclass(frozen=True, slots=True)
class StepSpec:
    """What a rank must read for a step; see ``Step`` for the other fields."""

    rows: tuple[tuple[Unit, ...], ...]
    numbers: tuple[int, ...]
    num_answers: int
    num_users: int
    epoch: int
    state: StreamState


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's share of an optimizer step."""

    rows: list[PackedRow]
    """Equally many on every rank; empty rows, of weight 0, fill up."""
    numbers: tuple[int, ...]
    """Of each row within the step over all ranks, for random streams that must not depend on the world size."""
    num_answers: int
    """Answers of the step over all ranks, as planned: the loss is the sum over all answers divided by this.

    Under ``skip`` a damaged sample's answers stay in this number, so they count with loss 0 and no rank needs to ask
    the others."""
    num_users: int
    """Users of the step over all ranks, as planned."""
    epoch: int
    state: StreamState
    """After this step."""
    errors: tuple[str, ...] = ()
    """What was wrong with this rank's samples that are left out."""
