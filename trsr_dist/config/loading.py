"""Read a YAML file and dotted overrides into a ``Config``; every mistake is named with its nearest known key.

Settings that are right alone and wrong together are found here, not hours later.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from trsr_dist.config.files import Dumper, find_file, parse_value, parse_yaml, read_zero_config
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
from trsr_dist.errors import ConfigError
from trsr_dist.files import read_text
from trsr_dist.printable import strike_addresses
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
        for text in (*_of_the_data(self), *_of_the_prompts(self), *_of_the_training(self), *_of_the_base(self)):
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


SECTIONS: dict[str, type[BaseModel]] = {name: field.annotation for name, field in Config.model_fields.items()}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the file (else the shipped one of that name), then ``key=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has a wrong type, two settings
            contradict each other, or a DeepSpeed file that one names is missing or wrong. No message repeats a
            password of an address.
    """
    try:
        return _load(path, overrides)
    except ConfigError as error:
        raise ConfigError(strike_addresses(str(error))) from None


def _load(path: str | Path, overrides: list[str] | tuple[str, ...]) -> Config:
    settings = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(settings, override)
    for section, values in settings.items():
        _check_section(section)
        for name in values:
            check_key(f"{section}.{name}")
    try:
        # As JSON, whose lists may be tuples; nothing else is converted: yes is no 1, and "3" no number.
        config = Config.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        raise ConfigError(_describe(error, path)) from None
    except TypeError as error:  # a set, bytes: YAML has tags for them
        raise ConfigError(f"{path}: {error}; write texts, numbers and lists only") from None
    # Files that the last stages read must be there before the first one is paid for.
    for key, name in (
        ("train.deepspeed_config", config.train.deepspeed_config),
        ("evaluate.deepspeed_config", config.evaluate.deepspeed_config),
    ):
        if name or key.startswith("train"):
            try:
                read_zero_config(find_file(name), key)
            except OSError as error:
                raise ConfigError(f"{key}={name}: {error.strerror}") from None
    return config


def dump_config(config: Config) -> str:
    """The merged config as YAML, as it is written to ``RUN/config``."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, width=100)


def flat_settings(config: Config) -> dict[str, Any]:
    """The merged config by dotted key, with values as in JSON."""
    sections = config.model_dump(mode="json").items()
    return {f"{section}.{key}": value for section, values in sections for key, value in values.items()}


def known_keys() -> list[str]:
    """Every key in dotted form."""
    return [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]


def _read_yaml(path: Path) -> dict[str, Any]:
    found = find_file(str(path))
    if not found.is_file():
        raise ConfigError(f"{path}: no such config file; the shipped ones are named such as configs/mind.yaml")
    try:
        settings = parse_yaml(read_text(found)) or {}
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'data:', found a {type(settings).__name__}")
    for section, values in settings.items():
        if section in SECTIONS and not isinstance(values, dict):
            raise ConfigError(f"{path}: section '{section}' must hold 'key: value' lines, found {values!r}")
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise ConfigError(f"override {override!r}: expected section.key=value, such as train.learning_rate=1e-4")
    try:
        value = parse_value(text)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None
    _check_section(section)
    settings.setdefault(section, {})[name] = "" if value is None else value


def _check_section(section: str) -> None:
    if section not in SECTIONS:
        raise ConfigError(f"unknown section '{section}'{_nearest(section, list(SECTIONS))}")


def check_key(key: str) -> None:
    """Refuse a dotted key that is none.

    Raises:
        ConfigError: names the nearest one.
    """
    if key not in known_keys():
        raise ConfigError(f"unknown key '{key}'{_nearest(key, known_keys())}")


def _nearest(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(str(word), known, n=1, cutoff=0.4)
    return f"; did you mean '{matches[0]}'?" if matches else f"; known: {', '.join(known)}"


def _describe(error: ValidationError, path: str | Path) -> str:
    lines = []
    for entry in error.errors():
        key = ".".join(str(part) for part in entry["loc"][:2])
        message, kind, value = entry["msg"].removeprefix("Value error, "), entry["type"], entry["input"]
        if isinstance(value, bool) and kind != "bool_type":
            message += " (YAML reads yes, no, on and off as true and false: write it in quotes, or a number)"
        elif kind == "string_type" and isinstance(value, int | float):
            message += " (a text of digits is written in quotes)"
        elif isinstance(value, str) and kind in ("int_type", "float_type", "bool_type"):
            message += " (without quotes)"
        lines.append(f"{key}={value!r}: {message}" if key else message)
    return f"{path}: " + "; ".join(lines)


def _of_the_data(config: Config) -> Iterator[str]:
    """Contradictions, each with the keys, their values and what is needed."""
    data = config.data
    if data.format != "demo" and not data.path:
        yield f"data.path is empty: data.format={data.format} needs the folder of the raw files"
    if data.max_history and data.max_history < data.min_history:
        yield f"data.max_history={data.max_history} is below data.min_history={data.min_history}"
    if data.missed_targets == "skip" and not data.candidates_file:
        yield "data.missed_targets=skip leaves out users whose target a data.candidates_file misses: name that file"
    if min(data.split) < 0 or not data.split[0]:
        yield f"data.split={list(data.split)}: shares are not negative, and train's is at least 1"
    if data.train_prefixes > 1 and data.candidates == "impressions":
        yield (
            f"data.train_prefixes={data.train_prefixes} with data.candidates=impressions: what was shown with earlier "
            "items is not known; choose other candidates, or set it to 1"
        )
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


def _of_the_base(config: Config) -> Iterator[str]:
    base = config.base
    if base.hidden_size % (2 * base.num_heads):
        yield (
            f"base.hidden_size={base.hidden_size} gives base.num_heads={base.num_heads} no equal, even widths: take a "
            f"multiple of {2 * base.num_heads}"
        )
    if base.num_heads % base.num_kv_heads:
        yield f"base.num_heads={base.num_heads} is no multiple of base.num_kv_heads={base.num_kv_heads}"
