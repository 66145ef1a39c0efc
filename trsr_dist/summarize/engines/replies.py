"""What an OpenAI-compatible server says: texts, and what it refuses. Any form may come."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import openai

from trsr_dist.summarize.requests import WHOLE, Completion, Request

PER_REQUEST = re.compile("context|too long", re.IGNORECASE)
"""Refused for its length: another prompt may fit, though the words name options too."""
CHARACTERS_PER_TOKEN = 100
"""A text of more is no answer to the request."""
MALFORMED = (
    ValueError, TypeError, LookupError, AttributeError, RecursionError, openai.APIResponseValidationError
)  # fmt: skip
"""What reading a reply of any form may raise."""


def read_reply(request: Request, reply: Any) -> Completion:
    """The completion in a reply of either protocol.

    Raises:
        ValueError: the reply holds no text, or one that was aborted or filtered or is far too long; a reply of another
            form may raise whatever is in ``MALFORMED``.
    """
    choices = getattr(reply, "choices", None)
    if not choices:
        raise ValueError(f"no choices in {str(reply)!r}")
    choice = choices[0]
    ending = getattr(choice, "finish_reason", None)
    if ending not in WHOLE:
        raise ValueError(f"finish_reason {ending!r}")
    message = getattr(choice, "message", None)
    text = getattr(message, "content", None) if message is not None else getattr(choice, "text", None)
    if text is None and ending == "length":
        text = ""  # all that was written are thoughts, which the server keeps apart
    if not isinstance(text, str):
        raise ValueError(f"no text in {str(reply)!r}")
    if len(text) > CHARACTERS_PER_TOKEN * max(request.max_new_tokens, 1):
        raise ValueError(f"a text of {len(text)} characters, where {request.max_new_tokens} tokens were asked for")
    usage = getattr(reply, "usage", None)
    return Completion(
        request.key,
        text,
        cut=ending == "length",
        prompt_tokens=_number(getattr(usage, "prompt_tokens", 0)),
        new_tokens=_number(getattr(usage, "completion_tokens", 0)),
    )


def _number(value: object) -> int:
    """A count, 0 where a server sends something else."""
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


def refused_option(error: openai.APIStatusError, options: Mapping[str, Any]) -> str:
    """The option that a server refuses by name; empty where it refuses the request itself."""
    words, named = str(error), getattr(error, "param", None)
    if PER_REQUEST.search(words):
        return ""
    if named == "model":
        return named
    return next((name for name in options if name == named or _names(words, name)), "")


def _names(words: str, option: str) -> bool:
    """Whether an error speaks of an option: a common word counts where it is quoted or called one."""
    if "_" in option:
        return option in words or (option.startswith("chat_template") and "chat_template" in words)
    return bool(
        re.search(rf"""['"`]{option}['"`]|(argument|parameter|field|property)\w*\W(\w+\W+){{0,3}}{option}\b""", words)
    )


def describe(error: openai.OpenAIError) -> str:
    """Kind of error, the server's words, and what lies below it."""
    status = f" {error.status_code}" if isinstance(error, openai.APIStatusError) else ""
    below = f" ({error.__cause__})" if error.__cause__ and str(error.__cause__) else ""
    return f"{type(error).__name__}{status}: {error}{below}"
