"""The connection to an OpenAI-compatible server: its address, what is secret in it, limits of time and size, and what
it says when it refuses. The one place that sends requests over HTTP, and that says so where its library, an extra, is
not installed: others import it from here. Any form may come back."""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from trsr_dist.environment import KEY_VARIABLE, server_key
from trsr_dist.errors import ConfigError, EngineError
from trsr_dist.printable import HALVES, Secrets, in_one_line

try:
    import openai
except ImportError as error:
    raise ConfigError(f"servers are asked with openai: {error} (pip install 'trsr_dist[openai]')") from None

T = TypeVar("T")

httpx = import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
"""httpx or httpx2, whichever the client is built on."""
MAX_REPLY_BYTES = 1 << 24
HANGING = 3.0
"""Times the limit of a try: connecting and waiting for a free connection have separate limits."""
LEAST_QUERY_CHARACTERS = 4
"""Shorter values of an address's query are no secrets."""
COMMON_WORD = re.compile(r"[a-z]{1,7}|\d{1,7}", re.IGNORECASE)
"""A server that wants no secret gets a key such as local or EMPTY: in a text that is a word."""
PER_REQUEST = re.compile("context|too long|at least 1,", re.IGNORECASE)
"""Refused for its length: another prompt may fit, though the words name options too."""
MALFORMED = (
    ValueError, TypeError, LookupError, AttributeError, RecursionError, openai.APIResponseValidationError
)  # fmt: skip
"""What reading a reply of any form may raise."""
REFUSALS = (openai.BadRequestError, openai.UnprocessableEntityError)
"""Of a request as it is, for an option in it or for its length."""
MOST_CHARACTERS = 300
"""Of a server's words that are kept."""
LONGEST_PAUSE = 5.0
"""Seconds before a malformed reply is asked for again."""


@dataclass(frozen=True, slots=True)
class Address:
    """An address in its parts."""

    public: str
    """Without user, password, query and fragment."""
    user: str
    password: str
    query: dict[str, str]

    @classmethod
    def parse(cls, address: str, setting: str) -> Address:
        """Take an address apart.

        Args:
            address: with user, password and query, or without.
            setting: that holds it, for the message.

        Raises:
            ConfigError: it is none; the message does not repeat it, since it may hold a password.
        """
        try:
            parts = urlsplit(address.strip())
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise ConfigError(f"{setting} is no address of a server; expected such as http://host:8000/v1")
        public = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        return cls(public, unquote(parts.username or ""), unquote(parts.password or ""), query)


class Connection:
    """A client of a server, with all that must not be told. The key comes from the environment alone.

    Args:
        address: may hold user, password and query.
        timeout_seconds: of one try.
        max_retries: of one request.
        setting: that holds the address, for messages.

    Raises:
        ConfigError: the address is none, or the key cannot stand in a header.
    """

    def __init__(self, address: str, timeout_seconds: float, max_retries: int, setting: str) -> None:
        parts, key = Address.parse(address, setting), server_key().strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{KEY_VARIABLE} holds characters that no header of HTTP may hold; set it again")
        self.address = parts.public
        queries = [value for value in parts.query.values() if len(value) >= LEAST_QUERY_CHARACTERS]
        values = [key, parts.password, f"{parts.user}:{parts.password}" if parts.password else "", *queries]
        self.secrets = Secrets(value for value in values if not COMMON_WORD.fullmatch(value))
        """Struck from texts, too."""
        self.private = Secrets([*values, parts.user])
        """Struck from messages; in texts a user's name may be a common word."""
        self.limits = Limits(timeout_seconds)
        self._max_retries = max_retries
        headers = {"Accept-Encoding": "identity"}
        if parts.user or parts.password:  # they take the key's place, as in any HTTP client
            encoded = base64.b64encode(f"{parts.user}:{parts.password}".encode()).decode()
            headers["Authorization"] = f"Basic {encoded}"
        hooks = {"request": [self.limits.begin], "response": [self.limits.bound]}
        try:
            self.client = openai.OpenAI(
                base_url=parts.public,
                api_key=key or "none",
                timeout=timeout_seconds,
                max_retries=max_retries,
                default_headers=headers,
                default_query=parts.query,
                http_client=openai.DefaultHttpxClient(event_hooks=hooks),
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"{parts.public}: no address of a server ({error})") from None
        self._root = self.client.with_options(base_url=parts.public.rstrip("/").removesuffix("/v1"))

    def post(self, path: str, body: object) -> Any:
        """The JSON that comes back from a path below the server's root, such as ``/v1/completions``.

        Raises:
            openai.OpenAIError: nothing does, or an error.
        """
        return self._root.post(path, cast_to=object, body=body)

    def models(self) -> Any:
        """What the server says of its models; errors as of ``post``."""
        return self._root.get("/v1/models", cast_to=object)

    def until_whole(self, ask: Callable[[], T]) -> T:
        """What ``ask`` makes of a reply; one that is no whole answer, which the client knows nothing of, is asked for
        again.

        Raises:
            one of ``MALFORMED``: the last one was none either.
        """
        for number in range(self._max_retries):
            try:
                return ask()
            except MALFORMED:
                time.sleep(min(0.2 * 2**number, LONGEST_PAUSE))
        return ask()

    def say(self, error: Exception | str) -> str:
        """The words of an error, or of a server; struck first, since a part of a secret is one too."""
        words = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        words = describe(error) if isinstance(error, openai.OpenAIError) else words
        return in_one_line(HALVES.sub("\ufffd", self.private.strike(words)), MOST_CHARACTERS)


class Limits:
    """Bounds replies: the library's time limit is that of each piece, and a server may drip for ever.

    Args:
        timeout_seconds: of one try.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._begun: dict[int, float] = {}

    def begin(self, request: httpx.Request) -> None:
        self._begun[threading.get_ident()] = time.monotonic()

    def bound(self, response: httpx.Response) -> None:
        """The header has come; the rest is read within limits."""
        since = self._begun.get(threading.get_ident(), time.monotonic())
        self.end()
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx.ReadError("a compressed reply, which was not asked for", request=response.request)
        response.stream = _Bounded(response.stream, since + self.timeout_seconds, response.request)

    def end(self) -> None:
        """This thread waits for nothing more."""
        self._begun.pop(threading.get_ident(), None)

    def check(self) -> None:
        """To be asked by another thread now and then.

        Raises:
            EngineError: a server drips its header.
        """
        now = time.monotonic()
        longest = now - min(self._begun.copy().values(), default=now)
        if longest > HANGING * self.timeout_seconds:
            raise EngineError(f"a reply has not begun in {longest:.0f} s; restart the server and run the stage again")


class _Bounded(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, end: float, request: httpx.Request) -> None:
        self._stream = stream
        self._end = end
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._stream:
            size += len(piece)
            if size > MAX_REPLY_BYTES:
                raise httpx.ReadError(f"a reply of more than {MAX_REPLY_BYTES} bytes", request=self._request)
            if time.monotonic() > self._end:
                raise httpx.ReadTimeout("the reply takes too long", request=self._request)
            yield piece

    def close(self) -> None:
        self._stream.close()


def refused_option(error: openai.APIStatusError, options: Mapping[str, Any]) -> str:
    """The option that a server refuses by name; empty where it refuses the request itself."""
    words, named = str(error), getattr(error, "param", None)
    if PER_REQUEST.search(words):
        return ""
    if named == "model":
        return named
    for option in options:
        is_named = option in words or (option.startswith("chat_template") and "chat_template" in words)
        if "_" not in option:  # a common word counts where it is quoted or called an option
            kind = r"(argument|parameter|field|property)\w*\W(\w+\W+){0,3}"
            is_named = re.search(rf"""['"`]{option}['"`]|{kind}{option}\b""", words) is not None
        if option == named or is_named:
            return option
    return ""


def describe(error: openai.OpenAIError) -> str:
    """Kind of error, the server's words, and what lies below it."""
    status = f" {error.status_code}" if isinstance(error, openai.APIStatusError) else ""
    below = f" ({error.__cause__})" if error.__cause__ and str(error.__cause__) else ""
    return f"{type(error).__name__}{status}: {error}{below}"
