"""Read a YAML file and dotted overrides into a ``Config``; every mistake is named with its nearest known key.

Of YAML, whatever would be read as something else than it looks like is refused, with a hint: PyYAML follows YAML 1.1,
where 010 is 8, 1:30 is 90, 1e-4 is a text, 2024-01-02 a date and the last of two equal keys counts.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

from trsr_dist.config.whole import Config
from trsr_dist.config.zero import find_file, read_zero_config
from trsr_dist.errors import ConfigError
from trsr_dist.files import read_text
from trsr_dist.printable import CONTROLS, strike_addresses

ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.\d*)?)$")
"""Octal without 0o, or sexagesimal."""
TIMESTAMP = "tag:yaml.org,2002:timestamp"
FLOAT = "tag:yaml.org,2002:float"
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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


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


class Loader(yaml.SafeLoader):
    """Refuses keys that stand twice or are no text, numbers of bases other than they look, anchors and aliases."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"key {key!r} is no text; write it in quotes", node.start_mark)
        return mapping

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            text = f"an anchor or alias ({event.anchor!r}), which is not supported; write the value out, or in quotes"
            raise ConstructorError(None, None, text, event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        value = super().construct_scalar(node)
        if node.style is None and node.tag.endswith((":int", ":float")) and ODD_NUMBER.match(value):
            text = f"{value} is a number of base 8 or 60 in YAML; write it as a decimal number, or in quotes as a text"
            raise ConstructorError(None, None, text, node.start_mark)
        if CONTROLS.search(value):
            raise ConstructorError(None, None, f"{value!r} holds a control character", node.start_mark)
        return value


# YAML 1.1 wants a point and a sign in the exponent.
Loader.add_implicit_resolver(FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a document.

    Raises:
        ConfigError: what is wrong, and where; the caller adds in which file.
    """
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # explicit tags such as !!int and !!timestamp raise all kinds
        raise ConfigError(f"not valid YAML: {error}") from None


def parse_value(text: str) -> Any:
    """The value of an override, which must be all that YAML sees: "a #b" would lose its end.

    Raises:
        ConfigError: what is wrong.
    """
    value = parse_yaml(text)
    node = yaml.compose(text, Loader)
    if node is None:
        is_whole = not text.strip()
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        is_whole = node.value == text.strip()
    else:
        is_whole = not (text[: node.start_mark.index] + text[node.end_mark.index :]).strip()
    if not is_whole:
        raise ConfigError(f"YAML reads {text!r} as {value!r}; write it in quotes of YAML, such as \"'a #b'\"")
    return value
