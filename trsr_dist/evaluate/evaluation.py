"""What one evaluation reads, how it is set and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trsr_dist.config import Config
from trsr_dist.evaluate.identity import model_identity
from trsr_dist.evaluate.passes import ScoringPass, plan_passes
from trsr_dist.evaluate.scores import ScoreFolder
from trsr_dist.run import MANIFEST, RunFolder, is_finished, manifest_hash


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model on one split."""

    config: Config
    run: RunFolder
    model: str
    """Merged folder, checkpoint or adapter."""
    base: str
    """The model before fine-tuning."""
    output: Path
    """Holds {split}.json, {split}/ and report.html."""

    @property
    def split(self) -> str:
        return self.config.evaluate.split

    @property
    def folder(self) -> Path:
        """Scores and manifest."""
        return self.output / self.split

    @property
    def results(self) -> Path:
        return self.output / f"{self.split}.json"

    @property
    def passes(self) -> list[ScoringPass]:
        return plan_passes(self.config.evaluate.baselines)

    @property
    def precision(self) -> str:
        """``train.precision`` with auto resolved."""
        if self.config.train.precision != "auto":
            return self.config.train.precision
        return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"

    def source(self, entry: ScoringPass) -> str:
        return self.model if entry.source == "model" else self.base

    def scores(self, entry: ScoringPass) -> ScoreFolder:
        return ScoreFolder(self.folder / entry.name)

    def identity(self, entry: ScoringPass, prompt: str) -> dict[str, Any]:
        """What the scores of a pass depend on; ``prompt`` is the fingerprint of the prompt builder."""
        return {
            "shards": manifest_hash(self.run.split(self.split)),
            "model": model_identity(self.source(entry)),
            "prompt": prompt,
            "change": entry.change,
            "seed": self.config.run.seed,
            "row_tokens": self.config.evaluate.row_tokens,
            "max_users": self.config.evaluate.max_users,
            "precision": self.precision,
        }

    def settings(self) -> dict[str, Any]:
        """What the results depend on beside the inputs."""
        evaluate = self.config.evaluate.model_dump(mode="json", exclude={"negatives_per_positive"})
        return evaluate | {"seed": self.config.run.seed, "precision": self.precision}

    def inputs(self) -> dict[str, str]:
        """Hashes of what is read."""
        sources = sorted({entry.source for entry in self.passes})
        models = {name: model_identity(self.model if name == "model" else self.base) for name in sources}
        histories, shards = manifest_hash(self.run.histories), manifest_hash(self.run.split(self.split))
        return {"histories": histories, "shards": shards, **models}

    def is_done(self, force: bool) -> bool:
        """Whether the results of exactly this evaluation stand there; a half-done one is taken up again.

        Raises:
            RunError: the folder holds the results of another evaluation.
        """
        has_manifest = (self.folder / MANIFEST).is_file() and self.results.is_file()
        return has_manifest and is_finished(self.folder, self.settings(), self.inputs(), force)

    def clear(self) -> None:
        """Remove the results and scores of an earlier evaluation."""
        for path in (self.results, self.folder / MANIFEST):
            path.unlink(missing_ok=True)
        for folder in sorted(path for path in self.folder.glob("*") if path.is_dir()):
            ScoreFolder(folder).clear()
