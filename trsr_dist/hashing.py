"""Hashes and random streams that do not depend on the machine, the process or a library's version."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

SEPARATOR = "\x1f"


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class ListDigest:
    """``digest`` of a list whose values come one by one."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()
        self._is_empty = True

    def add(self, value: Any) -> None:
        self._state.update(("[" if self._is_empty else ",").encode() + _canonical(value))
        self._is_empty = False

    def hexdigest(self) -> str:
        state = self._state.copy()
        state.update(b"[]" if self._is_empty else b"]")
        return state.hexdigest()


def hash64(*keys: object) -> int:
    """An unsigned 64-bit hash of the keys' text."""
    text = SEPARATOR.join(map(str, keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hash64_bytes(keys: Iterable[str], before: Sequence[object], after: Sequence[object]) -> bytes:
    """``hash64(*before, key, *after)`` of many keys: eight bytes each, the highest first."""
    new = hashlib.blake2b
    head = "".join(f"{value}{SEPARATOR}" for value in before)
    tail = "".join(f"{SEPARATOR}{value}" for value in after)
    return b"".join([new(f"{head}{key}{tail}".encode(), digest_size=8).digest() for key in keys])


def random_stream(*keys: object) -> random.Random:
    """A separate random stream for these keys, such as (seed, user, "negatives")."""
    return random.Random(hash64(*keys))
