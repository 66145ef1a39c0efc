"""Time that failing devices cost a training, and how often it should save. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY = 86400.0
RATES = {"2,000 days a device": 2000 * DAY, "7.9 hours at 1,024 devices": 7.9 * 3600 * 1024}
"""Seconds between failures of one device: a good cluster, and Meta's in 2024 (Kokolis et al., arXiv 2410.21680)."""
SAVE_SECONDS, RESTART_SECONDS = 1.0, 37.0
"""The goal for a checkpoint's pause, and from a failure to the next step on the tests' laboratory, whose nodes share a
machine and whose model loads at once: docs/reliability.md."""
DEVICES = (8, 64, 512, 1024, 4096, 16384)


@dataclass(frozen=True, slots=True)
class Restarts:
    """How a job saves and fails. All times in seconds."""

    save: float
    """The pause of a checkpoint."""
    interval: float
    """Work between checkpoints."""
    restart: float
    """From a failure to the next step: notice, queue, start, reading the checkpoint, the first window."""
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


def best_restarts(save: float, restart: float) -> dict[int, dict[str, Restarts]]:
    """By number of devices and name of the rate, each with its best interval; times in seconds."""
    return {
        num_devices: {
            name: Restarts(save, best_interval(save, mean / num_devices), restart, mean / num_devices)
            for name, mean in RATES.items()
        }
        for num_devices in DEVICES
    }
