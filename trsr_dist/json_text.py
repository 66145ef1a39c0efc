"""The one reader of JSON, be it a file, a line, a tar's member or a server's reply. Pure."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic_core import ValidationError, from_json

from trsr_dist.errors import DataError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SHOWN_CHARACTERS = 60
"""Of a wrong value, in messages."""


def parse_json(data: bytes | str, form: Any = dict[str, Any], finite: bool = True, unique: bool = False) -> Any:
    """The value in ``data``, which must be UTF-8.

    Args:
        data: the text.
        form: type of the value, such as a dataclass; nothing is converted, so that "1" is no number. ``object``: any.
        finite: refuse the names NaN and Infinity, which are not JSON; Python and some models' configs write them.
        unique: refuse a key that stands twice, of which readers keep the last; for what people write.

    Raises:
        DataError: not JSON (numbers of thousands of digits, nesting without end and halves of surrogate pairs are
            refused too), or of another form; the caller adds where it stands.
    """
    try:
        data = data.encode() if isinstance(data, str) else data
        value = from_json(data, allow_inf_nan=not finite)
        if unique:
            decode_unique(data.decode())
        if form not in (object, dict[str, Any]):
            return _adapter(form).validate_json(data, strict=True)
    except ValidationError as error:
        raise DataError(describe_form(error)) from None
    except ValueError as error:
        hint = ": an escape such as \\ud83d stands without its second half" if "hex escape" in str(error) else ""
        raise DataError(f"not valid JSON ({error}{hint})") from None
    if form is not object and not isinstance(value, dict):
        raise DataError(f"a JSON {type(value).__name__}; expected an object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; an ``object_pairs_hook``.

    Raises:
        ValueError: a key stands twice.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return record


decode_unique = json.JSONDecoder(object_pairs_hook=unique_keys).decode
"""``json.loads`` that refuses a key that stands twice (ValueError)."""


def describe_form(error: ValidationError) -> str:
    """The first thing that is wrong: its key, what was expected and what was found."""
    entry = error.errors(include_url=False)[0]
    key = ".".join(map(str, entry["loc"])) or "the whole"
    found = "" if entry["type"] == "missing" else f", found {str(entry['input'])[:SHOWN_CHARACTERS]!r}"
    return f"{key}: {entry['msg'][0].lower()}{entry['msg'][1:]}{found}"


@lru_cache
def _adapter(form: Any) -> TypeAdapter:
    from pydantic import TypeAdapter  # takes its time, and locks need none

    return TypeAdapter(form)
