"""The plan of a run: from its config and what lies in its folder to the time, memory and money of its stages. Writes
nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from trsr_dist.config import Config, dump_config
from trsr_dist.config.files import OFFLOADS, find_file, read_zero_config
from trsr_dist.config.sections import PROMPTLESS
from trsr_dist.data.store import HistoryStore
from trsr_dist.environment import array_task, detect_ranks
from trsr_dist.errors import ConfigError, RunError
from trsr_dist.evaluate.passes import drawn_protocols, plan_passes
from trsr_dist.log import show
from trsr_dist.planner import text
from trsr_dist.planner.cost import Cluster
from trsr_dist.planner.hardware import hardware
from trsr_dist.planner.memory import StepSettings, ZeroSetting
from trsr_dist.planner.shape import ModelShape
from trsr_dist.planner.stages import (
    ZERO_SETTINGS,
    PlannedStage,
    ScoringSettings,
    SummaryForecast,
    TrainingSettings,
    forecast_scoring,
    forecast_summaries,
    forecast_training,
)
from trsr_dist.planner.work import (
    BYTES_PER_TOKEN,
    PromptLengths,
    SummarySettings,
    history_lengths,
    placeholder_text,
    shard_lengths,
    split_work,
    summary_work,
)
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import MANIFEST, RunFolder
from trsr_dist.summarize.plans import writer

HERE = "here"
"""The name of the hardware that is measured."""
WORD_BYTES = 6
"""An English word with its blank: the extractive engine's limit counts words."""


def cluster_of(args: argparse.Namespace) -> Cluster:
    """From the options of ``cluster_options``.

    Raises:
        ConfigError: the hardware is unknown, or there can be no such cluster.
    """
    if args.hardware == HERE:
        from trsr_dist.planner.here import this_machine

        device = this_machine(args.devices_per_node)
    else:
        device = hardware(args.hardware)
    utilization = device.utilization if args.mfu is None else args.mfu
    pauses = (args.save_seconds, args.restart_seconds)
    return Cluster(device, args.nodes, args.devices_per_node, utilization, args.price, *pauses)


def dry_run(config: Config, args: argparse.Namespace, stage: str) -> int:
    """Print config and forecast of one stage, from the first process of all."""
    if detect_ranks().is_main and array_task()[0] == 0:
        cluster = cluster_of(args)
        planned = plan_stages(config, [stage], cluster.hardware.precision)
        show(dump_config(config) + "# plan\n" + text.in_words(planned, cluster))
    return 0


def plan_stages(config: Config, names: Sequence[str], precision: str) -> list[PlannedStage]:
    """The stages, in the order of ``STAGES``.

    Args:
        config: of the run.
        names: of the stages.
        precision: what ``train.precision=auto`` means on the hardware.

    Raises:
        ConfigError: a stage of another name is asked for.
        RunError: what a stage would read is not there.
        ModelError: a model's config or tokenizer cannot be read.
    """
    unknown = sorted(set(names) - set(STAGES))
    if unknown:
        raise ConfigError(f"stage {unknown[0]!r}: expected one of {', '.join(STAGES)}")
    inputs = Inputs(config, precision)
    return [make(config, inputs) for name, make in STAGES.items() if name in names]


class Inputs:
    """What the stages read, opened once and when needed."""

    def __init__(self, config: Config, auto_precision: str) -> None:
        self._config = config
        self.precision = auto_precision if config.train.precision == "auto" else config.train.precision
        self.run = RunFolder(Path(config.run.dir))

    @cached_property
    def store(self) -> HistoryStore:
        return HistoryStore(self.run.histories, check=False)

    @cached_property
    def shape(self) -> ModelShape:
        """Of the model that is trained."""
        return ModelShape.from_config(self._model_config.to_dict())

    @cached_property
    def builder(self) -> PromptBuilder:
        from trsr_dist.pretrained import load_tokenizer

        return PromptBuilder(load_tokenizer(self._source), **self._config.prompt.model_dump())

    @cached_property
    def shares_prefix(self) -> bool:
        """Whether the model's prompts can share their prefixes."""
        from trsr_dist.model.loading import why_not_shared

        return not why_not_shared(self._model_config, self.builder.max_tokens)

    @cached_property
    def _model_config(self) -> Any:
        from trsr_dist.pretrained import load_config

        return load_config(self._source)

    @property
    def _source(self) -> Any:
        from trsr_dist.pretrained import BaseSource

        model = self._config.model
        if not model.name_or_path:
            raise ConfigError("model.name_or_path is empty: name a base model's folder or hub id")
        return BaseSource(self.run.resolve(model.name_or_path), model.revision, model.trust_remote_code)

    def require(self, split: str) -> None:
        """Look for what is to be read, before the hub is asked for anything.

        Raises:
            RunError: the split has no shards, and there are no histories either.
        """
        if not self._has_shards(split):
            self.store  # noqa: B018

    def _has_shards(self, split: str) -> bool:
        return (self.run.split(split) / MANIFEST).is_file()

    def lengths(self, split: str) -> PromptLengths:
        """Of a split's prompts: from its shards, or, where there are none yet, from its histories.

        Raises:
            RunError: there are no histories either, or the split has no users.
        """
        if self._has_shards(split):
            url = self._config.train.shards_url if split == "train" else ""
            found = shard_lengths(self.run.split(split), self.builder, url)
        else:
            found = history_lengths(
                self.store,
                split,
                self.builder,
                self._config.domain,
                self._expected_summary,
                self._config.prompt.recent_items,
            )
        if not found.num_users:
            raise RunError(f"{self.run.root}: no users in {split}; prepare data with another data.split")
        return found

    def _expected_summary(self, history: Sequence[str]) -> str:
        """What will stand in place of the summary, or as many of the history's own words as the longest one has."""
        settings = self._config.summarize
        if settings.scheme in PROMPTLESS:
            return writer(settings.scheme)(history, self._config.prompt.recent_items, settings.max_new_tokens)
        unit = WORD_BYTES if settings.engine == "extractive" else BYTES_PER_TOKEN
        return placeholder_text(history, round(settings.max_new_tokens * unit))


def summarize_stage(config: Config, inputs: Inputs) -> PlannedStage:
    """The summarization of all splits."""
    s = config.summarize
    settings = SummarySettings(
        scheme=s.scheme,
        block_size=s.block_size,
        fan_in=s.fan_in,
        max_prompt_tokens=s.max_prompt_tokens,
        max_new_tokens=s.max_new_tokens,
        users_per_unit=s.users_per_shard,
        domain=config.domain,
        num_in_flight=s.max_in_flight,
        engine=s.engine,
        precision="auto" if s.engine == "openai" else s.precision,  # such a server has its own
        samples=s.samples,
    )
    work = summary_work(inputs.store, settings)
    shape = None
    if s.asks_model:
        from trsr_dist.pretrained import BaseSource, load_config

        source = BaseSource(inputs.run.resolve(s.model), s.revision, s.trust_remote_code)
        shape = ModelShape.from_config(load_config(source).to_dict())
    return PlannedStage(
        "summarize",
        lambda cluster: forecast_summaries(shape, work, settings, cluster) if shape else SummaryForecast(work),
        lambda found, cluster: text.summary_lines(found, settings, cluster),
    )


def train_stage(config: Config, inputs: Inputs) -> PlannedStage:
    """The training."""
    inputs.require("train")
    train, lora = config.train, config.lora
    full_head = train.loss == "full_text"
    settings = TrainingSettings(
        num_epochs=train.num_epochs,
        max_steps=train.max_steps,
        rows_per_step=train.rows_per_step,
        lora_r=lora.r,
        full_head=full_head,
        shares_prefix=inputs.shares_prefix,
        step=StepSettings(
            row_tokens=train.row_tokens,
            precision=inputs.precision,
            recompute=train.activation_checkpointing,
            target_modules=lora.target_modules,
            answers_only=inputs.shares_prefix and not full_head,
            dropout=lora.dropout > 0,
            quantization=config.model.quantization,
            compiled=config.model.compile,
        ),
    )
    shape, chosen = inputs.shape, zero_setting(train.deepspeed_config)
    work = split_work(inputs.lengths("train"), train.row_tokens, train.negatives_per_positive, config.run.seed)
    return PlannedStage(
        "train",
        lambda cluster: forecast_training(shape, work, settings, cluster, chosen),
        lambda found, cluster: text.training_lines(shape, settings, found, cluster, chosen),
        train.rows_per_step,
        "train.rows_per_step",
    )


def zero_setting(file: str) -> str:
    """Which of ``ZERO_SETTINGS`` a file of DeepSpeed's holds, whatever its name; else the one of its ZeRO stage."""
    zero = read_zero_config(find_file(file))["zero_optimization"]
    leaves = [zero.get(name, {}).get("device", "none") != "none" for name in OFFLOADS]
    held = ZeroSetting(zero["stage"], *leaves)
    return next((name for name, setting in ZERO_SETTINGS.items() if setting == held), f"zero{held.stage}")


def evaluate_stage(config: Config, inputs: Inputs) -> PlannedStage:
    """The evaluation of the config's split, all passes of a language model."""
    evaluate = config.evaluate
    inputs.require(evaluate.split)
    drawn = drawn_protocols(evaluate.protocols, config.data.held_out_candidates)
    settings = ScoringSettings(
        passes=tuple(entry.name for entry in plan_passes(evaluate.baselines, drawn)),
        row_tokens=evaluate.row_tokens,
        precision=inputs.precision,
        divided=bool(evaluate.deepspeed_config),
        shares_prefix=inputs.shares_prefix,
    )
    lengths = inputs.lengths(evaluate.split)
    asked = replace(lengths, num_users=min(evaluate.max_users or lengths.num_users, lengths.num_users))
    shape, work = inputs.shape, split_work(asked, evaluate.row_tokens, None, config.run.seed)
    return PlannedStage(
        "evaluate",
        partial(forecast_scoring, shape, work, settings),
        partial(text.scoring_lines, evaluate.split),
    )


STAGES = {"summarize": summarize_stage, "train": train_stage, "evaluate": evaluate_stage}
"""How each is planned, in the order of a run."""
