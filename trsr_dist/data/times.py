"""Times as people write them, to Unix seconds. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from trsr_dist.data.source import Counts

NUMBER = re.compile(r"-?[0-9]{9,19}(?:\.[0-9]*)?")
"""A number as text; shorter ones (20240131) are dates."""
UNITS = ((1e11, 1e0, ""), (1e14, 1e3, "milliseconds"), (1e17, 1e6, "microseconds"), (2.0**62, 1e9, "nanoseconds"))
"""Numbers below the first value are in the unit: seconds until the year 5138, milliseconds from 1973 on, and so on."""
MOST_SECONDS = UNITS[0][0]
FORMATS = (
    "%a %b %d %H:%M:%S %z %Y",
    "%a %b %d %H:%M:%S %Z %Y",
    "%a %b %d %H:%M:%S %Y",
    "%a, %d %b %Y %H:%M:%S %z",
    "%a, %d %b %Y %H:%M:%S %Z",
)
"""Of Goodreads and Twitter, of ``date`` and C's ``ctime``, of mail and HTTP."""


class Times:
    """Reads the times of one data set; each value has its own unit.

    Args:
        time_format: of text, for ``strptime``; empty: ISO 8601 and ``FORMATS``.
        counts: how many values were not in seconds.
    """

    def __init__(self, time_format: str, counts: Counts) -> None:
        self._format = time_format
        self._counts = counts

    @property
    def expected(self) -> str:
        """For messages."""
        if self._format:
            return f"a time as data.time_format={self._format!r} or Unix seconds; repair the row"
        return "Unix seconds or ISO 8601; repair the row, or name the form with data.time_format"

    def seconds(self, value: Any) -> float:  # noqa: ANN401 (any JSON value)
        """Unix seconds.

        Raises:
            TypeError, ValueError, OverflowError: it is no time.
        """
        if isinstance(value, str):
            text = value.strip()
            if self._format or not NUMBER.fullmatch(text):
                return self._of_text(text)
            value = float(text)
        if isinstance(value, bool) or value is None:
            raise TypeError
        if -MOST_SECONDS < value < MOST_SECONDS:
            return float(value)
        for limit, per_second, name in UNITS:
            if abs(value) < limit:
                self._counts[f"times_in_{name}"] += 1
                return value / per_second
        raise ValueError

    def _of_text(self, text: str) -> float:
        if self._format:
            return _timestamp(datetime.strptime(text, self._format))
        try:
            return _timestamp(datetime.fromisoformat(_with_offset(text)))
        except ValueError:
            return _timestamp(_of_formats(text))


def _with_offset(text: str) -> str:
    """``2020-09-13 12:26:40 UTC`` as ISO 8601 has it."""
    return f"{text[:-4]}+00:00" if text.endswith((" UTC", " GMT")) else text


def _of_formats(text: str) -> datetime:
    for form in FORMATS:
        try:
            return datetime.strptime(text, form)
        except ValueError:
            continue
    raise ValueError


def _timestamp(time: datetime) -> float:
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
