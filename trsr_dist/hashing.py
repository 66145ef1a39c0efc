"""Hashes and random streams that do not depend on the machine, the process or a library's version."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash64(*keys: object) -> int:
    """An unsigned 64-bit hash of the keys' text."""
    text = "\x1f".join(map(str, keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def random_stream(*keys: object) -> random.Random:
    """A random stream of its own for these keys, such as (seed, user, "negatives")."""
    return random.Random(hash64(*keys))
