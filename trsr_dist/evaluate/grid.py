"""With what the sequential baselines are trained: the grid, and what the sizes of the data allow of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SequentialSettings:
    """Sizes and training of GRU4Rec and SASRec."""

    hidden_size: int = 64
    dropout: float = 0.2
    learning_rate: float = 1e-3
    num_layers: int = 2
    """Of SASRec."""
    max_length: int = 50
    """Latest items that the model sees."""
    batch_size: int = 16
    """Users of an optimizer step."""
    num_negatives: int = 0
    """Items that a step's sampled softmax draws; 0: the softmax over the whole catalogue."""
    min_epochs: int = 8
    """Both models stand at chance for the first hundreds of steps."""
    max_epochs: int = 30
    patience_epochs: int = 3
    """Training stops after so many epochs without a better validation metric."""

    @property
    def point(self) -> dict[str, Any]:
        """What differs within the grid."""
        return {key: value for key, value in asdict(self).items() if key in GRID[0]}


GRID: tuple[dict[str, Any], ...] = (
    {"hidden_size": 64, "dropout": 0.2, "learning_rate": 5e-3},
    {"hidden_size": 64, "dropout": 0.5, "learning_rate": 5e-3},
    {"hidden_size": 64, "dropout": 0.2, "learning_rate": 1e-2},
    {"hidden_size": 64, "dropout": 0.5, "learning_rate": 1e-2},
)
MAX_LOGITS = 2**25
"""Of a step: with more positions times items than these (128 MiB in float32, three times) the softmax is sampled."""
NUM_NEGATIVES = 1024
STEPS_PER_EPOCH = 50
BATCH_SIZES = (16, 128)
"""Users of a step, at least and at most; between them as many as give an epoch its steps."""
MAX_WORK = 4 * 10**9
"""Logits of an epoch, summed over the grid: beyond them the settings' defaults alone are trained."""
WORK_OF_BODY = 4096
"""What the layers below the softmax cost at a position, in logits."""


def make_grid(lengths: Sequence[int], num_items: int) -> list[SequentialSettings]:
    """The points of the grid that are tried.

    Args:
        lengths: items of each train user.
        num_items: of the catalogue.
    """
    least, most = BATCH_SIZES
    batch_size = min(max(len(lengths) // STEPS_PER_EPOCH, least), most)
    max_length = SequentialSettings().max_length
    num_negatives = NUM_NEGATIVES if batch_size * max_length * num_items > MAX_LOGITS else 0
    positions = sum(min(length - 1, max_length) for length in lengths)
    work = positions * ((num_negatives or num_items) + WORK_OF_BODY)
    points = GRID if len(GRID) * work <= MAX_WORK else ({},)
    return [SequentialSettings(**point, batch_size=batch_size, num_negatives=num_negatives) for point in points]
