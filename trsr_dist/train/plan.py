"""The plan of a training in words, for --dry-run."""

from __future__ import annotations

from trsr_dist.config import Config
from trsr_dist.environment import Ranks
from trsr_dist.run import RunFolder


def plan_text(config: Config, run: RunFolder, ranks: Ranks) -> str:
    return f"# plan\n# {run.split('train')} on {ranks.world_size} ranks\n"
