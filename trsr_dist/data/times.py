"""Times as people write them, in Unix seconds. Pure."""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any

import numpy as np

NUMBER = re.compile(r"-?[0-9]{9,19}(?:\.[0-9]*)?")
"""A number as text; shorter ones (20240131) are dates."""
UNITS = ((1e11, 1e0, ""), (1e14, 1e3, "milliseconds"), (1e17, 1e6, "microseconds"), (2.0**62, 1e9, "nanoseconds"))
"""Numbers below the first value are in the unit: seconds until the year 5138, milliseconds from 1973 on, and so on."""
MOST_SECONDS = UNITS[0][0]
COMPACT_DATES, COMPACT_FORM = (1.9e13, 2.1e13), "%Y%m%d%H%M%S"
"""20240131120000 is a date of our time; as milliseconds it would be one of the year 2611."""
FORMATS = (
    "%a %b %d %H:%M:%S %z %Y",
    "%a %b %d %H:%M:%S %Z %Y",
    "%a %b %d %H:%M:%S %Y",
    "%a, %d %b %Y %H:%M:%S %z",
    "%a, %d %b %Y %H:%M:%S %Z",
)
"""Of Goodreads and Twitter, of ``date`` and C's ``ctime``, of mail and HTTP."""
UTC_NAMES = ("UTC", "GMT")
"""Zones that need no offset; other names mean different zones to different people."""


def unix_seconds(value: Any, time_format: str, counts: Counter[str]) -> float:  # noqa: ANN401 (any JSON value)
    """Seconds of a time as people write it; each value has its own unit.

    Args:
        value: number, text or, of a table, date or time; those without a zone are UTC.
        time_format: of text, for ``strptime``; empty: ISO 8601 and ``FORMATS``.
        counts: how many values were not in seconds.

    Raises:
        TypeError, ValueError, OverflowError: it is no time.
    """
    if isinstance(value, str):
        text = value.strip()
        if time_format or not NUMBER.fullmatch(text):
            return _seconds_of(parsed_as(text, time_format) if time_format else _parsed_time(text))
        value = float(text)
    if isinstance(value, date):
        return _seconds_of(value if isinstance(value, datetime) else datetime(value.year, value.month, value.day))
    if isinstance(value, bool) or value is None:
        raise TypeError
    if -MOST_SECONDS < value < MOST_SECONDS:
        return float(value)
    if COMPACT_DATES[0] <= value < COMPACT_DATES[1]:
        return _seconds_of(datetime.strptime(str(int(value)), COMPACT_FORM))
    for limit, per_second, name in UNITS:
        if abs(value) < limit:
            counts[f"times_in_{name}"] += 1
            return value / per_second
    raise ValueError


def all_seconds(values: np.ndarray, counts: Counter[str]) -> np.ndarray:
    """``unix_seconds`` of each number.

    Args:
        values: int64 or float64, shape (num_values,).
        counts: how many values were not in seconds.

    Returns:
        float64, shape (num_values,).

    Raises:
        ValueError: one is no time, or a compact date; nothing was counted.
    """
    seconds, is_open = values.astype(np.float64), np.ones(len(values), bool)
    found = {}
    for limit, per_second, name in UNITS:
        bound = values.dtype.type(limit)
        here = is_open & (values > -bound) & (values < bound)
        is_open &= ~here
        if name and here.any():
            found[f"times_in_{name}"] = int(here.sum())
            seconds[here] /= per_second
    if is_open.any() or ((values >= COMPACT_DATES[0]) & (values < COMPACT_DATES[1])).any():
        raise ValueError
    counts.update(found)
    return seconds


def _seconds_of(time: datetime) -> float:
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def parsed_as(text: str, form: str) -> datetime:
    """A time in a form of ``strptime``, which takes the names of this machine's zone too, and leaves them out.

    Raises:
        ValueError: it has another form, or a zone's name other than UTC and GMT and no offset.
    """
    found = datetime.strptime(text, form)
    if "%Z" in form and not found.tzinfo and (time.strptime(text, form).tm_zone or "UTC").upper() not in UTC_NAMES:
        raise ValueError
    return found


def _parsed_time(text: str) -> datetime:
    with suppress(ValueError):
        is_utc = text.endswith(tuple(f" {name}" for name in UTC_NAMES))  # ISO 8601 has an offset
        return datetime.fromisoformat(f"{text[:-4]}+00:00" if is_utc else text)
    for form in FORMATS:
        with suppress(ValueError):
            return parsed_as(text, form)
    raise ValueError
