"""What failures and checkpoints cost a long run."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Restarts:
    """How a job saves and fails. All times in seconds."""

    save: float
    """A checkpoint's."""
    interval: float
    """Work between checkpoints."""
    restart: float
    """From a failure to the next step: queue, start, reading the checkpoint, the first window."""
    between_failures: float
    """Mean of the whole job: of one device, divided by the number of devices."""

    @property
    def overhead(self) -> float:
        """Expected time a second of work, less 1; failures come at random, in restarts too (Daly 2006)."""
        mean = self.between_failures
        segment = mean * math.exp(self.restart / mean) * math.expm1((self.interval + self.save) / mean)
        return segment / self.interval - 1


def best_interval(save: float, between_failures: float) -> float:
    """Seconds of work between checkpoints that cost least, to first order (Young 1974)."""
    return math.sqrt(2 * save * between_failures)
