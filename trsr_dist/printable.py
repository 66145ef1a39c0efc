"""Words of others on their way to a terminal or into a message: they steer no terminal and tell no secret. Pure."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tabulator and line feed, marks that turn the direction of writing, halves of characters."""
HALVES = re.compile("[\ud800-\udfff]")
"""Of characters: no text in UTF-8 holds them."""
USER_INFO = re.compile(r"(\w://)[^\s'\"]*@")
QUERY = re.compile(r"(\w://[^\s'\"?]*\?)[^\s'\"]+")
STRUCK = "***"
SHORT = 8
"""Secrets of fewer characters are struck where they stand as a word: they may be part of common ones."""


def printable(text: str, encoding: str | None = "utf-8") -> str:
    """``text`` with control characters escaped, and whatever the encoding lacks."""
    text = CONTROLS.sub(lambda found: _escaped(found[0]), strike_addresses(text))
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def in_one_line(text: object, limit: int) -> str:
    """White space becomes single blanks; what is longer than ``limit`` characters ends in dots."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def strike_addresses(text: str) -> str:
    """User, password and query of every address in ``text`` are struck."""
    return QUERY.sub(rf"\1{STRUCK}", USER_INFO.sub(rf"\1{STRUCK}@", text)) if "://" in text else text


class Secrets:
    """Strikes known secrets out of texts, however they are written there.

    Args:
        values: keys, passwords and the like; empty ones are passed over.
    """

    def __init__(self, values: Iterable[str]) -> None:
        forms: set[str] = set()
        for value in values:  # as it is, as in addresses, in JSON, in Python's words and in a Basic header
            encoded = base64.b64encode(value.encode(errors="replace")).decode()
            forms |= {value, quote(value, safe=""), unquote(value), json.dumps(value)[1:-1], repr(value)[1:-1], encoded}
        patterns = [
            re.escape(form) if len(form) >= SHORT else rf"(?<!\w){re.escape(form)}(?!\w)"
            for form in sorted(filter(str.strip, forms), key=lambda form: (-len(form), form))
        ]
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def strike(self, text: str) -> str:
        """``text`` without them."""
        return self._pattern.sub(STRUCK, text) if self._pattern else text


def _escaped(character: str) -> str:
    return f"\\x{ord(character):02x}" if character < "\x80" else f"\\u{ord(character):04x}"
