"""Read a YAML file and dotted overrides into a ``Config``; every mistake is named with its nearest known key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from trsr_dist.config.sections import Config
from trsr_dist.config.zero import find_file, read_zero_config
from trsr_dist.errors import ConfigError
from trsr_dist.printable import strike_addresses


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the file, then ``key=value`` overrides.

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
    _reject_unknown_keys(settings)
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_describe(error, path)) from None
    _check_files(config)
    return config


def dump_config(config: Config) -> str:
    """The merged config as YAML, as it is written to ``RUN/config``."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def known_keys() -> list[str]:
    """Every key in dotted form."""
    return [f"{section}.{key}" for section, model in _sections().items() for key in model.model_fields]


def _sections() -> dict[str, type[BaseModel]]:
    return {name: field.annotation for name, field in Config.model_fields.items()}


def _check_files(config: Config) -> None:
    """Files that the last stages read must be there before the first one is paid for."""
    for key, name in (
        ("train.deepspeed_config", config.train.deepspeed_config),
        ("evaluate.deepspeed_config", config.evaluate.deepspeed_config),
    ):
        if name or key.startswith("train"):
            read_zero_config(find_file(name), key)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; the shipped ones lie in configs/")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'data:', found a {type(settings).__name__}")
    for section, values in settings.items():
        if section in _sections() and not isinstance(values, dict):
            raise ConfigError(f"{path}: section '{section}' must hold 'key: value' lines, found {values!r}")
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise ConfigError(f"override {override!r}: expected section.key=value, such as train.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    _check_section(section)
    settings.setdefault(section, {})[name] = "" if value is None else value


def _reject_unknown_keys(settings: dict[str, Any]) -> None:
    for section, values in settings.items():
        _check_section(section)
        for name in values:
            check_key(f"{section}.{name}")


def _check_section(section: str) -> None:
    if section not in _sections():
        raise ConfigError(f"unknown section '{section}'{_nearest(section, list(_sections()))}")


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
        message = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "string_type" and isinstance(entry["input"], bool):
            message += " (YAML reads yes, no, on and off as true and false: write it in quotes)"
        lines.append(f"{key}={entry['input']!r}: {message}" if key else message)
    return f"{path}: " + "; ".join(lines)
