"""The language models of an evaluation: first their prompts, then weights where there is something to score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from trsr_dist import distributed
from trsr_dist.config.zero import find_file, read_zero_config
from trsr_dist.environment import Ranks
from trsr_dist.errors import ConfigError, ModelError
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.passes import PartWorker
from trsr_dist.evaluate.scores import ScoreFolder
from trsr_dist.log import get_logger
from trsr_dist.model.folder import ModelPrompts, load_weights, open_prompts
from trsr_dist.model.forward import score_row
from trsr_dist.model.zero3 import scoring_config
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.rows import PackedRow

log = get_logger("evaluate")


def open_models(job: Evaluation) -> dict[str, ModelPrompts]:
    """Prompts by the source of the passes; the base reads those of the model.

    Raises:
        ModelError: a tokenizer cannot be read, or the model has other answers than the config.
    """
    model, prompt = job.config.model, job.config.prompt.model_dump()
    found = open_prompts(job.model, prompt, model.trust_remote_code, model.revision)
    if tuple(found.builder.answers) != tuple(job.config.prompt.answers):
        raise ModelError(
            f"{job.model}: trained to answer {tuple(found.builder.answers)}, prompt.answers is "
            f"{tuple(job.config.prompt.answers)}; set prompt.answers to the model's"
        )
    if not job.has_base:
        return {"model": found}
    base = open_prompts(job.base, prompt, model.trust_remote_code)
    return {"model": found, "base": replace(base, builder=PromptBuilder(base.tokenizer, **found.builder.settings))}


class Scorer:
    """This process's part in the passes of one model.

    Args:
        job: the evaluation.
        source: ``model`` or ``base``.
        prompts: of the model.
        worker: this process's share of the parts.
        ranks: this process.
    """

    def __init__(self, job: Evaluation, source: str, prompts: ModelPrompts, worker: PartWorker, ranks: Ranks) -> None:
        self._job = job
        self._passes = [entry for entry in job.passes if entry.source == source]
        self._prompts = prompts
        self._worker = worker
        self._ranks = ranks
        self._device = distributed.device_of(ranks)
        self._zero = zero_config(job.config.evaluate.deepspeed_config, job.precision, self._device)
        self._model: nn.Module | None = None

    def load(self, anew: bool = False) -> None:
        """Open the weights where parts are missing (of divided weights: on any rank), or all are scored again."""
        has_work = anew or any(
            not self._job.scores(entry).has(part) for entry in self._passes for part in self._worker.mine
        )
        if self._zero is not None:
            has_work = distributed.sum_over_ranks([float(has_work)], self._device)[0] > 0
        if not has_work:
            return
        if self._device.type == "cpu":
            # Matrix products split their sums by threads: one thread gives the same digits for any number of ranks.
            torch.set_num_threads(1)
        dtype, attention = getattr(torch, self._job.precision), self._job.config.model.attention
        self._model = load_weights(self._prompts, self._device, dtype, attention, self._zero)

    def run(self, folders: dict[str, ScoreFolder]) -> None:
        """Score what is missing of all passes; the weights are given back at the end."""
        for entry in self._passes:
            count, builder = 0, self._prompts.builder
            if self._model is not None and self._zero is not None:
                count = self._worker.run_together(entry, folders[entry.name], builder, self._forward, self._device)
            elif self._model is not None:
                count = self._worker.run(entry, folders[entry.name], builder, self._forward)
            log.info("%s: scored %d of %d parts here", entry.name, count, len(self._worker.parts))
        self._model = None

    def _forward(self, row: PackedRow) -> np.ndarray:
        assert self._model is not None
        return score_row(self._model, row, self._device)


def zero_config(name: str, precision: str, device: torch.device) -> dict | None:
    """DeepSpeed's config for scoring; None where none is named.

    Raises:
        ConfigError: the file is not of stage 3: the other stages divide nothing that scoring needs.
    """
    if not name:
        return None
    settings = read_zero_config(find_file(name), "evaluate.deepspeed_config")
    stage = settings["zero_optimization"]["stage"]
    if stage != 3:
        raise ConfigError(
            f"evaluate.deepspeed_config={name}: ZeRO stage {stage} divides no weights: nothing is gained; name a "
            "file with stage 3 or leave it empty"
        )
    return scoring_config(settings, precision, device.type == "cuda")
