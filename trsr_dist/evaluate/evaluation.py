"""What one evaluation reads, how it is set, and where it writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsr_dist.config import Config, dump_config
from trsr_dist.data.candidates import HELD_OUT, clicks_of
from trsr_dist.errors import ConfigError
from trsr_dist.evaluate.passes import ScoringPass, drawn_protocols, plan_passes
from trsr_dist.evaluate.score_files import IDENTITY, ScoreFolder
from trsr_dist.files import sha256_of
from trsr_dist.log import get_logger
from trsr_dist.model.artifacts import model_identity
from trsr_dist.run import MANIFEST, RunFolder, check_inputs, manifest_hash, read_manifest

REMEDY = "use another --output, or --force to score again (in a Slurm array: remove the folder)"

log = get_logger("evaluate")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model on one split."""

    config: Config
    run: RunFolder
    model: str
    """Merged folder, checkpoint or adapter."""
    output: Path
    """Holds {split}.json, {split}/ and report.html."""
    base: str = ""
    """Folder of the model before fine-tuning; empty where no pass needs it."""
    precision: str = ""
    """``train.precision`` with auto resolved."""

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
    def baselines(self) -> Path:
        """Models that were trained as baselines, and the results of an evaluation without a model."""
        return self.output / "baselines"

    @property
    def report(self) -> Path:
        return self.output / "report.html"

    @property
    def records(self) -> RunFolder:
        """Holds metrics.jsonl, tensorboard/ and config/: the run, or the output where that lies elsewhere."""
        return self.run if self.output.resolve() == self.run.evaluation.resolve() else RunFolder(self.output)

    def write_config(self, only_missing: bool = False) -> None:
        """Keep the resolved config beside the results."""
        self.records.write_config("evaluate", dump_config(self.config), only_missing)

    @property
    def protocols(self) -> list[str]:
        """Candidate lists that are drawn beside the shards' own."""
        return drawn_protocols(self.config.evaluate.protocols, self.config.data.held_out_candidates)

    @property
    def own_candidates(self) -> str:
        """How the shards' lists came about; of retrieved ones also how many users' targets the retriever missed."""
        kind, manifest = self.config.data.held_out_candidates, read_manifest(self.run.histories)
        if not self.config.data.candidates_file:
            return kind
        missed = manifest["counts"].get(f"{self.split}_users_with_missed_target", 0)
        users = manifest["splits"][self.split]["users"]
        if self.config.data.missed_targets == "skip":
            return f"{kind}; {missed} of {users + missed} users left out, whose target was not retrieved"
        return f"{kind}; of {missed} of {users} users the target was not retrieved and is added"

    @property
    def passes(self) -> list[ScoringPass]:
        return plan_passes(self.config.evaluate.baselines, self.protocols)

    @property
    def has_base(self) -> bool:
        """Whether the model before fine-tuning is ranked too."""
        return any(entry.source == "base" for entry in self.passes)

    def scores(self, entry: ScoringPass) -> ScoreFolder:
        return ScoreFolder(self.folder / entry.name)

    def identity(self, entry: ScoringPass, prompt: str) -> dict[str, Any]:
        """What the scores of a pass depend on; ``prompt`` is the fingerprint of the prompt builder."""
        drawn = {"histories": manifest_hash(self.run.histories), **self.draws()} if entry.protocol else {}
        is_base = entry.source == "base"
        return {
            "shards": manifest_hash(self.run.split(self.split)),
            "model": model_identity(self.base) if is_base else model_identity(self.model, self.config.model.revision),
            "prompt": prompt,
            "change": entry.change,
            "seed": self.config.run.seed,
            "row_tokens": self.config.evaluate.row_tokens,
            "max_users": self.config.evaluate.max_users,
            "precision": self.precision,
            **self._layers(),
            **drawn,
        }

    def draws(self) -> dict[str, Any]:
        """How the further candidate lists are drawn."""
        found = clicks_of(self.split, read_manifest(self.run.histories).get("settings", {}).get("split_by", ""))
        return {
            "num_negatives": self.config.evaluate.negatives_per_positive,
            "seen_before_target": self.config.data.seen_before_target,
        } | ({} if found == HELD_OUT else {"clicks_of": [*found]})

    def settings(self) -> dict[str, Any]:
        """What the results depend on beside the inputs."""
        exclude = {"negatives_per_positive", "deepspeed_config"}
        evaluate = self.config.evaluate.model_dump(mode="json", exclude=exclude)
        drawn = self.draws() if self.protocols else {}
        base = {"base": model_identity(self.base)} if self.has_base else {}
        # A model that records no prompts is ranked with the config's.
        read = {"prompt": self.config.prompt.model_dump(mode="json"), **self._layers()}
        return evaluate | drawn | base | read | {"seed": self.config.run.seed, "precision": self.precision}

    def _layers(self) -> dict[str, Any]:
        """How the layers are computed, which the last digits of scores depend on."""
        model = self.config.model
        return {"attention": model.attention} | ({"compile": True} if model.compile else {})

    def inputs(self) -> dict[str, str]:
        """Hashes of what is read."""
        histories, shards = manifest_hash(self.run.histories), manifest_hash(self.run.split(self.split))
        model = model_identity(self.model, self.config.model.revision)
        return {"histories": histories, "shards": shards, "model": model}

    def is_done(self, force: bool) -> bool:
        """Whether the results of exactly this evaluation are there.

        A half-done one is resumed, and one with other settings too: the scores that fit are used again, and
        ``ScoreFolder.open`` refuses those that do not.

        Raises:
            RunError: the folder holds the results of other shards, another model or other histories.
        """
        if force or not (self.folder / MANIFEST).is_file():
            return False
        check_inputs(self.folder, self.inputs(), REMEDY)
        manifest = read_manifest(self.folder)
        is_same = manifest.get("settings") == json.loads(json.dumps(self.settings()))
        # Each split has its turn on the one report.
        is_reported = self.report.is_file() and sha256_of(self.report) == manifest.get("report")
        return is_same and self.results.is_file() and is_reported

    def clear(self) -> None:
        """Remove the results and scores of an earlier evaluation."""
        for path in (self.folder / MANIFEST, self.results):
            path.unlink(missing_ok=True)
        for folder in {path.parent for name in ("part-*.jsonl", IDENTITY) for path in self.folder.rglob(name)}:
            ScoreFolder(folder).clear()


def check_draws(job: Evaluation) -> None:
    """The candidate lists of the histories must have been drawn as the config says.

    Raises:
        ConfigError: they were not.
    """
    data, evaluate = job.config.data, job.config.evaluate
    drawn = {"candidates_file": "", "missed_targets": "add"} | read_manifest(job.run.histories).get("settings", {})
    for key, name, asked in (
        ("candidates", "data.candidates", data.candidates),
        ("candidates_file", "data.candidates_file", data.candidates_file),
        ("missed_targets", "data.missed_targets", data.missed_targets),
        ("seen_before_target", "data.seen_before_target", data.seen_before_target),
        ("evaluation_negatives_per_positive", "evaluate.negatives_per_positive", evaluate.negatives_per_positive),
    ):
        if drawn.get(key, asked) != asked:
            raise ConfigError(
                f"{name}={asked}: the candidate lists were drawn with {drawn[key]} when the data was prepared; set it "
                "to that (evaluate.protocols ranks other kinds of lists beside them), or prepare again"
            )


def trained_on_these_shards(job: Evaluation, provenance: dict[str, Any]) -> bool | None:
    """Whether the model's train users are those of this run; None where that is unknown. Warns where they are not."""
    # Not those of ``job.run``, which of sampled summaries holds other texts of the same users.
    recorded, folder = provenance.get("shards", {}).get("train"), RunFolder(Path(job.config.run.dir)).split("train")
    if not recorded or not (folder / MANIFEST).is_file():
        return None
    is_same = recorded == manifest_hash(folder)
    if not is_same:
        log.warning(
            "%s was trained on other shards (%s...) than %s: %s users may be among those it was trained on",
            job.model, recorded[:12], folder, "valid and test" if job.split == "train" else job.split,
        )  # fmt: skip
    return is_same
