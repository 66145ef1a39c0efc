"""Choice and checks of the reader that data.format names."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from trsr_dist.config import Config
from trsr_dist.config.sections import DataSection
from trsr_dist.data.amazon_m2 import AmazonReader
from trsr_dist.data.demo import DEMO_FILES
from trsr_dist.data.jsonl import JsonlReader
from trsr_dist.data.mind import MindReader
from trsr_dist.data.source import LineReader, Reader, find_raw
from trsr_dist.errors import ConfigError


def build_reader(config: Config, raw: Path, lines: LineReader) -> Reader:
    """The reader of the raw files; the demo's lie in ``raw``."""
    data = config.data
    folder = raw if data.format == "demo" else Path(data.path)
    if data.format == "demo":
        return MindReader(folder / DEMO_FILES[0], folder / DEMO_FILES[1], data.target, lines)
    if data.format == "mind":
        news = find_raw(folder, data.items_file or "news.tsv")
        return MindReader(news, find_raw(folder, data.behaviors_file), data.target, lines)
    if data.format == "amazon_m2":
        products = find_raw(folder, data.items_file or "products_train.csv")
        return AmazonReader(products, find_raw(folder, data.sessions_file), data.locale, lines)
    items, log = find_raw(folder, data.items_file or "items.jsonl"), find_raw(folder, "interactions.jsonl")
    return JsonlReader(items, log, lines, data.item_fields, data.time_format)


def holds_locales(data: DataSection) -> bool:
    """Whether the catalogue holds several locales, an item's category being its own: a user's negatives then come from
    the user's locale, or language alone would tell them from the positives."""
    return data.format == "amazon_m2" and not data.locale


def item_fields(config: Config, reader: Reader) -> tuple[str, ...]:
    """Fields of an item's text.

    Raises:
        ConfigError: data.item_fields names one that the format does not have.
    """
    chosen = config.data.item_fields
    unknown = [name for name in chosen if reader.allowed_fields and name not in reader.allowed_fields]
    if unknown:
        raise ConfigError(
            f"data.item_fields: {unknown[0]!r} is not a field of data.format={config.data.format}; "
            f"it has {', '.join(reader.allowed_fields)}"
        )
    return chosen or reader.default_fields


def check_data_settings(config: Config) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: names the settings.
    """
    data = config.data
    if min(data.split) < 0 or not data.split[0]:
        raise ConfigError(f"data.split={list(data.split)}: shares are not negative, and train's is at least 1")
    if data.target == "impression" and data.format not in ("mind", "demo"):
        raise ConfigError(f"data.target=impression is for MIND's impressions; data.format={data.format} has none")
    if data.candidates == "impressions" and data.format in ("mind", "demo") and data.target != "impression":
        raise ConfigError(
            "data.candidates=impressions needs data.target=impression: what was shown with the last click is not in "
            "MIND's files"
        )
    if data.time_format:
        _check_time_format(data)
    if data.candidates == "impressions" and data.format == "amazon_m2":
        raise ConfigError("data.candidates=impressions: Amazon-M2 has no impressions; choose another strategy")


def _check_time_format(data: DataSection) -> None:
    if data.format != "jsonl":
        raise ConfigError(f"data.time_format is for data.format=jsonl; the times of {data.format} have one form")
    try:
        datetime.strptime(datetime(2001, 2, 3, 16, 5, 6).strftime(data.time_format), data.time_format)
    except ValueError as error:
        raise ConfigError(
            f"data.time_format={data.time_format!r}: {error}; expected such as '%d.%m.%Y %H:%M' (Python's strptime)"
        ) from None
