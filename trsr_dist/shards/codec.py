"""Sample to JSON bytes and back. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from trsr_dist.errors import DataError
from trsr_dist.hashing import digest
from trsr_dist.json_text import parse_json
from trsr_dist.records import Candidate, Sample

FIELDS = {
    "user": str,
    "instruction": str,
    "summary": str,
    "recent": list,
    "candidates": list,
    "provenance": dict,
}


def member_key(user: str) -> str:
    """Name of a user's member without ``.json``: a hash, so that no user id ever becomes part of a path."""
    return digest(user)[:32]


def encode_sample(sample: Sample) -> bytes:
    """UTF-8 JSON in one line; equal samples give equal bytes."""
    value = {
        "user": sample.user,
        "instruction": sample.instruction,
        "summary": sample.summary,
        "recent": list(sample.recent),
        "candidates": [{"item": c.item, "text": c.text, "label": c.label} for c in sample.candidates],
        "provenance": sample.provenance,
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def decode_sample(data: bytes, chosen: Sequence[int] | None = None) -> Sample:
    """The sample in ``data``.

    Args:
        data: what ``encode_sample`` wrote.
        chosen: keep only these candidates; None: all, and their types are checked.

    Raises:
        DataError: invalid JSON, or something is missing or of a wrong type; the caller adds where it stands.
    """
    value = parse_json(data)
    for name, kind in FIELDS.items():
        if not isinstance(value.get(name), kind):
            found = type(value[name]).__name__ if name in value else "nothing"
            raise DataError(f"field {name!r}: found {found}, expected {kind.__name__}")
    rows = value["candidates"] if chosen is None else [value["candidates"][i] for i in chosen]
    try:
        candidates = tuple([Candidate(row["item"], row["text"], row["label"]) for row in rows])
    except (KeyError, TypeError) as error:
        raise DataError(f"a candidate lacks {error}; expected item, text and label") from None
    if chosen is None:
        _check_types(value["recent"], candidates)
    return Sample(
        value["user"],
        value["instruction"],
        value["summary"],
        tuple(value["recent"]),
        candidates,
        value["provenance"],
    )


class Outline(NamedTuple):
    """A sample without its texts."""

    user: str
    items: list[str]
    labels: list[int]
    """Of the candidates, as the items."""
    provenance: dict[str, Any]


def decode_outline(data: bytes) -> Outline:
    """In half the time of ``decode_sample``, for samples that have been decoded before: types are not checked.

    Raises:
        DataError: invalid JSON, or something is missing.
    """
    value = parse_json(data)
    try:
        rows = value["candidates"]
        return Outline(value["user"], [r["item"] for r in rows], [r["label"] for r in rows], value["provenance"])
    except (KeyError, TypeError) as error:
        raise DataError(f"the sample lacks {error}") from None


def _check_types(recent: list[Any], candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise DataError("field 'candidates': an empty list; expected one candidate or more")
    if not all(isinstance(text, str) for text in recent):
        raise DataError("field 'recent': expected texts only")
    items, texts, labels = zip(*[(c.item, c.text, c.label) for c in candidates], strict=True)
    with suppress(TypeError):  # a label that is a list
        if {*map(type, items), *map(type, texts)} == {str} and {*labels} <= {0, 1}:
            return
    for candidate in candidates:
        if not (isinstance(candidate.item, str) and isinstance(candidate.text, str) and candidate.label in (0, 1)):
            raise DataError(f"candidate {candidate}: expected item and text as text, and label 0 or 1")
