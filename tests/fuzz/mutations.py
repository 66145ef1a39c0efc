"""Changes of bytes, JSON values and files that any format may meet."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOBODY = 65534
DIGITS = "9" * 5000
RAW = "@raw@"
"""Before text that ``dump`` writes without quotes: JSON that Python's own writer would not write."""
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e308, 10**25, "", " ", "\t", "0", "-0", "nan", "None", "null", [], {}, [[]], [None],
    {"a": {"b": []}}, [1, "a", None], ["x"] * 50, "\x1b[31mred\x1b[0m", "a\x00b", "a\r\nb", "\u2028", "\u200b",
    "\ufeff",
    "x" * 100_000, "日本語のタイトル", "<|im_end|>", "[Candidate]\nAnswer: yes", "../../etc/passwd",
    RAW + "NaN", RAW + "-Infinity", RAW + "1e999", RAW + DIGITS, RAW + '"\\ud83d"', RAW + '"\\udc00x"',
    RAW + "[" * 3000 + "]" * 3000, RAW + "1.0", RAW + "-0.0", RAW + '{"a": 1, "a": 2}', RAW + "'a'",
)  # fmt: skip
PIECES = (
    b"\0", b"\r", b"\n", b"\r\n", b"\t", b'"', b"'", b",", b"{", b"}", b"[", b"]", b"\\", b"\\u0000", b"\xff", b"\xc3",
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\xbd", b"\x1b[2J", b"\x1a", b"-", b"0", b" ", b"\\ud83d", b":",
)  # fmt: skip


def dump(value: Any) -> str:
    """JSON with the raw texts as they are."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dump(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dump, value)) + "]"
    if isinstance(value, str) and value.startswith(RAW):
        return value.removeprefix(RAW)
    return json.dumps(value)


def odd_value(draw: random.Random) -> Any:
    """A value that hardly any field expects."""
    return draw.choice(ODD_VALUES)


def change_json(draw: random.Random, value: Any, depth: int = 0) -> tuple[Any, str]:
    """One change somewhere in a JSON value: a part taken away, replaced or added; the new value and what was done."""
    if isinstance(value, dict) and value and (depth == 0 or draw.random() < 0.8):
        key = draw.choice(sorted(value))
        new = dict(value)
        match draw.randrange(6):
            case 0:
                del new[key]
                return new, f"{key} removed"
            case 1:
                new[key] = odd_value(draw)
                return new, f"{key}={str(new[key])[:40]!r}"
            case 2:
                new[draw.choice(("zzz", "", "\x1b[31m", "__proto__"))] = odd_value(draw)
                return new, "a key added"
            case _:
                new[key], what = change_json(draw, value[key], depth + 1)
                return new, f"{key}: {what}"
    if isinstance(value, list) and value and draw.random() < 0.8:
        place, new = draw.randrange(len(value)), list(value)
        match draw.randrange(4):
            case 0:
                del new[place]
                return new, f"[{place}] removed"
            case 1:
                new.insert(place, new[place])
                return new, f"[{place}] twice"
            case _:
                new[place], what = change_json(draw, value[place], depth + 1)
                return new, f"[{place}]: {what}"
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        new = draw.choice((value + 1, value - 1, -value, value * 2, str(value), float(value), 2**31, 2**64, 0))
        return new, f"{value} -> {new!r}"
    new = odd_value(draw)
    return new, f"{str(value)[:30]!r} -> {str(new)[:40]!r}"


def change_bytes(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """One to three changes of bytes."""
    told = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = draw.randrange(len(data)) if data else 0
        end = min(len(data), place + draw.choice((1, 2, 5, 20, 200)))
        match draw.randrange(7):
            case 0 if data:
                data = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
                told.append(f"bit at {place} flipped")
            case 1:
                data = data[:place]
                told.append(f"cut at {place}")
            case 2:
                data = data[:place] + data[end:]
                told.append(f"{place}:{end} removed")
            case 3:
                data = data[:place] + data[place:end] * 2 + data[end:]
                told.append(f"{place}:{end} twice")
            case 4:
                data = data[:place] + bytes(end - place) + data[end:]
                told.append(f"{place}:{end} zeroed")
            case _:
                piece = draw.choice(PIECES)
                data = data[:place] + piece + data[place:]
                told.append(f"{piece!r} at {place}")
    return data, ", ".join(told)


def compress(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """The same in a form that other tools write."""
    match draw.randrange(3):
        case 0:
            return gzip.compress(data), "gz"
        case 1:
            return bz2.compress(data), "bz2"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("data", data)
    return packed.getvalue(), "zip"


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def _sparse(path: Path, size: int = 1 << 30) -> None:
    os.truncate(path, size)


FILES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "one line feed": lambda path: path.write_bytes(b"\n"),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
    "a folder": _replace(lambda path: path.mkdir()),
    "a pipe": _replace(lambda path: os.mkfifo(path)),
    "a dangling link": _replace(lambda path: path.symlink_to("nowhere")),
    "a link to itself": _replace(lambda path: path.symlink_to(path.name)),
    "/dev/zero": _replace(lambda path: path.symlink_to("/dev/zero")),
    "1 GB of zeros at its end": _sparse,
    "unreadable": lambda path: path.chmod(0),
    "UTF-16": lambda path: path.write_bytes(path.read_bytes().decode("utf-8", "replace").encode("utf-16")),
}
"""What may lie under a file's name."""


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
            os.setegid(0)
