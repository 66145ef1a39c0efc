"""The whole config. Settings that are right alone and wrong together are found when it is read, not hours later."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

from trsr_dist.config.sections import (
    BaseSection,
    DataSection,
    DemoSection,
    EvaluateSection,
    LoraSection,
    ModelSection,
    PromptSection,
    RunSection,
    Section,
    SummarizeSection,
    TrainSection,
)
from trsr_dist.records import metric_names


class Config(Section):
    """All sections of a run."""

    run: RunSection = RunSection()
    demo: DemoSection = DemoSection()
    data: DataSection = DataSection()
    summarize: SummarizeSection = SummarizeSection()
    prompt: PromptSection = PromptSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    base: BaseSection = BaseSection()

    @model_validator(mode="after")
    def _no_contradictions(self) -> Config:
        for text in contradictions(self):
            raise ValueError(text)
        return self

    @property
    def domain(self) -> str:
        """The prompts' wording: ``news``, ``products`` or ``items``."""
        if self.data.domain != "auto":
            return self.data.domain
        return {"mind": "news", "demo": "news", "amazon_m2": "products", "amazon_reviews": "products"}.get(
            self.data.format, "items"
        )


def contradictions(config: Config) -> Iterator[str]:
    """Each with the keys, their values and what is needed."""
    yield from _of_the_data(config)
    yield from _of_the_prompts(config)
    yield from _of_the_training(config)


def _of_the_data(config: Config) -> Iterator[str]:
    data = config.data
    if data.format != "demo" and not data.path:
        yield f"data.path is empty: data.format={data.format} needs the folder of the raw files"
    if data.max_history and data.max_history < data.min_history:
        yield f"data.max_history={data.max_history} is below data.min_history={data.min_history}"
    if data.missed_targets == "skip" and not data.candidates_file:
        yield "data.missed_targets=skip leaves out users whose target a data.candidates_file misses: name that file"
    shares = dict(zip(("train", "valid", "test"), data.split, strict=True))
    if not shares[config.evaluate.split]:
        yield (
            f"data.split={list(data.split)} leaves no users for evaluate.split={config.evaluate.split}: give it a share"
        )
    if config.train.evaluate_every_steps and not shares["valid"]:
        yield (
            f"data.split={list(data.split)} leaves no valid users for train.evaluate_every_steps="
            f"{config.train.evaluate_every_steps}: give them a share, or set it to 0"
        )


def _of_the_prompts(config: Config) -> Iterator[str]:
    prompt, summarize = config.prompt, config.summarize
    if prompt.max_tokens > config.train.row_tokens:
        yield (
            f"prompt.max_tokens={prompt.max_tokens} is above train.row_tokens={config.train.row_tokens}: a row must "
            "hold at least one prompt"
        )
    if summarize.asks_model and not summarize.model:
        yield f"summarize.model is empty: summarize.engine={summarize.engine} needs a model"
    if summarize.samples and not (summarize.asks_model and summarize.temperature):
        yield (
            f"summarize.samples={summarize.samples} are all the same: a model must write them, at a "
            f"summarize.temperature above 0 (now engine={summarize.engine}, scheme={summarize.scheme}, "
            f"temperature={summarize.temperature})"
        )
    if prompt.answers[0] == prompt.answers[1]:
        yield f"prompt.answers={prompt.answers} are equal: two different answers are needed"


def _of_the_training(config: Config) -> Iterator[str]:
    train = config.train
    if train.negatives_per_positive > train.pool_size:
        yield (
            f"train.negatives_per_positive={train.negatives_per_positive} is above train.pool_size={train.pool_size}: "
            "a sample keeps only that many negatives to draw from"
        )
    if train.shards_url and "://" not in train.shards_url:
        yield f"train.shards_url={train.shards_url}: expected an address such as s3://bucket/run/shards/train"
    if train.loss == "distill" and not train.teacher:
        yield "train.teacher is empty: train.loss=distill follows the scores of a model, see tools/score_shards.py"
    if train.early_stopping_patience and not train.evaluate_every_steps:
        yield (
            f"train.early_stopping_patience={train.early_stopping_patience} counts evaluations, and "
            "train.evaluate_every_steps=0 makes none: set both"
        )
    names = metric_names(config.evaluate.top_k)
    if train.evaluate_every_steps and train.best_metric not in names:
        yield f"train.best_metric={train.best_metric!r}: expected one of {', '.join(names)} (see evaluate.top_k)"
