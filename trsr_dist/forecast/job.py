"""Forecasts for a run's config: reads sizes, reckons, words the result. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trsr_dist.config import Config, dump_config
from trsr_dist.environment import detect_ranks
from trsr_dist.evaluate.passes import drawn_protocols, plan_passes
from trsr_dist.forecast import text
from trsr_dist.forecast.models import model_shape
from trsr_dist.forecast.stages import TrainingSettings, forecast_scoring, forecast_training
from trsr_dist.forecast.summaries import forecast_summaries, summary_work
from trsr_dist.forecast.workload import SplitWork, split_work
from trsr_dist.planning.cost import Cluster
from trsr_dist.planning.hardware import hardware
from trsr_dist.planning.shape import ModelShape
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import MANIFEST, RunFolder


@dataclass(frozen=True, slots=True)
class Request:
    """For which cluster to plan."""

    hardware: str = "h100"
    num_nodes: int = 1
    devices_per_node: int = 8
    utilization: float = 0.4
    price_per_hour: float = 0.0

    @property
    def cluster(self) -> Cluster:
        """
        Raises:
            ConfigError: the hardware is unknown.
        """
        return Cluster(
            hardware(self.hardware), self.num_nodes, self.devices_per_node, self.utilization, self.price_per_hour
        )


def dry_run(config: Config, request: Request) -> int:
    """Print config and forecast of a training, from rank 0."""
    if detect_ranks().is_main:
        forecast = Forecast(config, request)
        print("\n".join([dump_config(config) + "# plan", *text.cluster_lines(forecast.cluster), *forecast.training()]))
    return 0


class Forecast:
    """Forecasts of one run.

    Args:
        config: of the run.
        request: see there.
    """

    def __init__(self, config: Config, request: Request) -> None:
        self.config = config
        self.run = RunFolder(Path(config.run.dir))
        self.cluster = request.cluster

    def all(self) -> str:
        """Every stage whose input is there."""
        parts = [text.cluster_lines(self.cluster)]
        if (self.run.histories / MANIFEST).is_file():
            parts.append(self.summaries())
        if (self.run.split("train") / MANIFEST).is_file():
            parts += [self.training(), self.evaluation()]
        else:
            parts.append(
                [f"training and evaluation: no shards in {self.run.shards} yet; run launch/summarize.py first"]
            )
        return "\n".join(line for part in parts for line in part)

    def summaries(self) -> list[str]:
        """The summarization."""
        from trsr_dist.data.store import HistoryStore

        s = self.config.summarize
        work = summary_work(
            HistoryStore(self.run.histories), s.scheme, s.block_size, s.fan_in, s.max_new_tokens, self.config.domain
        )
        if s.engine == "extractive" or s.scheme == "none":
            return text.summary_lines(work, None)
        shape = model_shape(self.run.resolve(s.model), s.revision)
        return text.summary_lines(work, forecast_summaries(shape, work, s.max_in_flight, self.cluster))

    def training(self) -> list[str]:
        """The training."""
        train, lora = self.config.train, self.config.lora
        work = self._work("train", train.row_tokens, train.negatives_per_positive)
        settings = TrainingSettings(
            num_epochs=train.num_epochs,
            max_steps=train.max_steps,
            rows_per_step=train.rows_per_step,
            row_tokens=train.row_tokens,
            lora_r=lora.r,
            target_modules=lora.target_modules,
            precision="float32" if train.precision == "float32" else "bfloat16",
            recompute=train.activation_checkpointing,
            full_head=train.loss == "full_text",
            dropout=lora.dropout > 0,
        )
        chosen = Path(train.deepspeed_config).stem
        found = forecast_training(self.shape, work, settings, self.cluster, chosen)
        return text.training_lines(self.shape, work, settings, found, self.cluster, chosen)

    def evaluation(self) -> list[str]:
        """The evaluation of the config's split, all passes of a language model."""
        evaluate = self.config.evaluate
        work = self._work(evaluate.split, evaluate.row_tokens, None)
        drawn = drawn_protocols(evaluate.protocols, self.config.data.candidates)
        passes = plan_passes(evaluate.baselines, drawn)
        flops, cost = forecast_scoring(self.shape, work, len(passes), self.cluster)
        return text.scoring_lines(evaluate.split, work, [entry.name for entry in passes], flops, cost)

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.run.resolve(self.config.model.name_or_path), self.config.model.revision)

    def _work(self, split: str, row_tokens: int, negatives: int | None) -> SplitWork:
        return split_work(self.run.split(split), self._builder(), row_tokens, negatives, self.config.run.seed)

    def _builder(self) -> PromptBuilder:
        from trsr_dist.model.loading import BaseSource, load_tokenizer

        model = self.config.model
        source = BaseSource(self.run.resolve(model.name_or_path), model.revision, model.trust_remote_code)
        return PromptBuilder(load_tokenizer(source), **self.config.prompt.model_dump())
