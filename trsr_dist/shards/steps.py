"""Steps: consecutive rows of the plan, dealt to the ranks; and where a stream stands. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from trsr_dist.errors import CheckpointError
from trsr_dist.rows import PackedRow
from trsr_dist.shards.packing import deal
from trsr_dist.shards.plan import TrainPlan, Unit, WindowPlan


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
    teacher: str = ""
    """Hash of the teacher's scores; empty: none are read."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> StreamState:
        return cls(**value)

    def check(self, start: StreamState) -> None:
        """Refuse to go on with other data or settings: the rows would be others.

        Raises:
            CheckpointError: names the first difference.
        """
        for name in (
            "shards",
            "prompt",
            "plan",
            "row_tokens",
            "rows_per_step",
            "negatives_per_positive",
            "seed",
            "teacher",
        ):
            saved, now = getattr(self, name), getattr(start, name)
            if saved != now:
                raise CheckpointError(
                    f"the checkpoint's stream has {name}={saved!r}, this run {now!r}; go on with the former, or start "
                    "a new run"
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


def step_specs(plan: TrainPlan, state: StreamState, rank: int, world_size: int) -> Iterator[StepSpec]:
    """The steps of one rank after ``state``, for ever."""
    while True:
        epoch = state.epoch
        picked, state = _next_rows(plan, state)
        if picked:
            yield _deal_rows(picked, epoch, state, rank, world_size)


def _next_rows(plan: TrainPlan, state: StreamState) -> tuple[list[tuple[WindowPlan, int]], StreamState]:
    """The rows of the next step (none where the epoch has no more) and the state after it."""
    epoch, window, row = state.epoch, state.window, state.row
    picked: list[tuple[WindowPlan, int]] = []
    while len(picked) < plan.settings.rows_per_step and window < plan.order.num_windows:
        current = plan.window(epoch, window)
        stop = min(current.num_rows, row + plan.settings.rows_per_step - len(picked))
        picked += [(current, number) for number in range(row, stop)]
        row = stop
        if row == current.num_rows:
            window, row = window + 1, 0
    if window == plan.order.num_windows:
        epoch, window, row = epoch + 1, 0, 0
    return picked, replace(state, epoch=epoch, window=window, row=row, step=state.step + bool(picked))


def _deal_rows(
    picked: list[tuple[WindowPlan, int]], epoch: int, state: StreamState, rank: int, world_size: int
) -> StepSpec:
    hand = deal([plan.cost(row) for plan, row in picked], world_size)[rank]
    rows = [picked[number][0].units(picked[number][1]) for number in hand]
    num_places = -(-state.rows_per_step // world_size)
    padding = [state.rows_per_step + rank + world_size * place for place in range(num_places - len(hand))]
    return StepSpec(
        rows=(*rows, *(() for _ in padding)),
        numbers=(*hand, *padding),
        num_answers=sum(plan.num_answers(row) for plan, row in picked),
        num_users=sum(plan.num_users(row) for plan, row in picked),
        epoch=epoch,
        state=state,
    )
