"""Any OpenAI-compatible server (vLLM serve, SGLang, llama.cpp) through the ``openai`` client.

The client retries connection errors, time-outs, 408, 409, 429 and 5xx with growing waits. What it does not retry, a
reply that is no valid or no whole answer, is retried here.
"""

from __future__ import annotations

import queue
import re
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from trsr_dist.connection import MALFORMED, REFUSALS, Connection, openai, refused_option
from trsr_dist.environment import server_address
from trsr_dist.errors import ConfigError, DataError, EngineError
from trsr_dist.log import get_logger
from trsr_dist.printable import HALVES
from trsr_dist.prompts.encoder import Encoder, for_any_tokenizer
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.prompts.trimming import trim_prompt
from trsr_dist.summarize.quality import STOPS
from trsr_dist.summarize.requests import WHOLE, Completion, EngineSettings, Request

TEMPLATE_TOKENS = 64
"""Kept free for the server's chat template (Llama 3's adds 36)."""
BYTES_PER_TOKEN = 3
"""Assumed where the server cannot count tokens: fewer than with most tokenizers, so that prompts fit."""
NUM_STOPS = 4
"""The most that the protocol allows."""
FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
"""Wrong key, address or model: no request can succeed."""
NO_TEMPLATE = re.compile("provide a chat template|chat_template is not set", re.IGNORECASE)
"""What vLLM and transformers say of a base model: no request of the chat protocol can succeed."""
FALLBACK_OPTIONS = {"max_tokens": "max_completion_tokens", "chat_template_kwargs": "", "seed": "", "stop": ""}
"""What is sent where a server refuses an option; empty: nothing."""
SETTINGS = {
    "max_completion_tokens": "lower summarize.max_new_tokens",
    "temperature": "set summarize.temperature to one that it takes",
    "model": "set summarize.model to one that it has",
}
"""What to do where a server refuses an option that has no other way."""
CHARACTERS_PER_TOKEN = 100
"""A text of more is no answer to the request."""
UNAVAILABLE = (429, 502, 503, 504)
"""A rate limit, or a proxy whose server is gone: never the prompt's fault."""

log = get_logger("summarize")


class OpenAIEngine:
    """Sends requests from a pool of threads; the key comes from the environment alone.

    Args:
        settings: of server and requests. ``plain`` prompts go by the completions protocol, others by the chat protocol
            with the server's template, whose variables are left out for servers that refuse them.
        encoder: with the model's tokenizer, where that is at hand: which control tokens the texts must not spell.

    Raises:
        ConfigError: no address is given, or it or the key cannot be used.
    """

    def __init__(self, settings: EngineSettings, encoder: Encoder | None = None) -> None:
        address = settings.base_url or server_address()
        if not address:
            raise ConfigError(
                "summarize.base_url is empty: engine=openai needs the server's address, http://host:8000/v1"
            )
        self.capacity = settings.max_in_flight
        self.settings = settings
        self.chat = settings.prompt_style != "plain"
        self._encoder, self._encoding = encoder, threading.Lock()  # a tokenizer serves one thread at a time
        limits = settings.timeout_seconds, settings.max_retries
        self._connection = Connection(address, *limits, "summarize.base_url or OPENAI_BASE_URL")
        self._client = self._connection.client
        self._instead: dict[str, str] = {}
        """Options that the server has refused, with what is sent in their place."""
        self._todo: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        """None ends a thread."""
        self._done: queue.SimpleQueue[Completion | Exception] = queue.SimpleQueue()
        self._in_flight = 0
        self._error: Exception | None = None
        """What ends the job, once the completions that came with it are handed out."""
        self._counts_tokens = True
        # Daemons: at the end of the process nothing waits for a server that hangs.
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self.capacity)]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> None:
        self._in_flight += 1
        self._todo.put(request)

    def poll(self) -> list[Completion]:
        done = []
        while self._in_flight and (not (done or self._error) or not self._done.empty()):
            try:
                outcome = self._done.get(timeout=self._connection.limits.timeout_seconds)
            except queue.Empty:
                self._connection.limits.check()
                continue
            self._in_flight -= 1
            if isinstance(outcome, Exception):
                self._error = self._error or outcome
            else:
                done.append(outcome)
        if self._error is not None and not done:
            raise self._error
        return done

    def close(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._todo.get_nowait()
        for _ in self._threads:
            self._todo.put(None)
        self._client.close()

    def _serve(self) -> None:
        """In a thread: whatever happens, one outcome is put into the queue, and no secret with it."""
        while (request := self._todo.get()) is not None:
            try:
                outcome = self._answer(request)
            except Exception as error:  # a reply of any form may come from a server
                outcome = self._server_error(error)
            finally:
                self._connection.limits.end()
            # A server may put secrets anywhere, and halves of characters, which no file takes.
            secrets, private = self._connection.secrets, self._connection.private
            if isinstance(outcome, EngineError):
                outcome = EngineError(private.strike(str(outcome)))
            else:
                text = secrets.strike(HALVES.sub("\ufffd", outcome.text))
                outcome = replace(outcome, text=text, error=private.strike(outcome.error))
            self._done.put(outcome)

    def _server_error(self, error: Exception, remedy: str = "", what: str = "") -> EngineError:
        words = f"{self._connection.address}: {what}{self._connection.say(error)}"
        return EngineError(f"{words}; {remedy}" if remedy else words)

    def _answer(self, request: Request) -> Completion | EngineError:
        try:
            prompt, words_cut = self._fit(request.prompt)
            return replace(self._ask_until_valid(replace(request, prompt=prompt)), words_cut=words_cut)
        except EngineError as error:
            return error
        except DataError as error:
            return Completion(request.key, error=str(error))
        except FATAL as error:
            return self._server_error(error, "check base_url, model and key")
        except openai.OpenAIError as error:
            # The request has failed, or the server is gone or too slow: then no request is at fault.
            is_down = isinstance(error, openai.APIStatusError) and error.status_code in UNAVAILABLE
            if isinstance(error, openai.APIConnectionError):
                is_down = isinstance(error, openai.APITimeoutError) or not self._server_answers()
            return self._unreachable(error) if is_down else Completion(request.key, error=self._connection.say(error))

    def _fit(self, prompt: SummaryPrompt) -> tuple[SummaryPrompt, int]:
        """Trim by the server's token count. A token holds at least one byte, so short prompts need no counting.

        Raises:
            DataError: the instruction alone is over the limit.
            EngineError: the server is gone.
        """
        limit = self.settings.max_prompt_tokens - TEMPLATE_TOKENS * self.chat
        if len(self._text(prompt).encode()) < limit:
            return prompt, 0
        return trim_prompt(prompt, lambda tried: self._count(self._text(tried)), limit)

    def _text(self, prompt: SummaryPrompt) -> str:
        """What is sent: the server's tokenizer must find no control token in the texts."""
        if self._encoder is None:
            return str(for_any_tokenizer(prompt.prompt()))
        with self._encoding:
            return self._encoder.text(prompt.prompt(self._encoder.value))

    def _unreachable(self, error: openai.OpenAIError) -> EngineError:
        remedy = "start the server"
        if isinstance(error, openai.APITimeoutError):
            remedy = "lower summarize.max_in_flight or raise summarize.timeout_seconds"
        elif isinstance(error, openai.RateLimitError):
            remedy = "lower summarize.max_in_flight or raise summarize.max_retries"
        return self._server_error(error, f"{remedy} and run the stage again")

    def _server_answers(self) -> bool:
        try:
            self._client.models.list()
        except openai.APIStatusError:
            return True
        except (*MALFORMED, openai.OpenAIError) as error:
            return not isinstance(error, openai.APIConnectionError)
        return True

    def _ask_until_valid(self, request: Request) -> Completion:
        try:
            return self._connection.until_whole(lambda: read_reply(request, self._ask(request)))
        except MALFORMED as error:
            reason = self._connection.say(error)
            return Completion(request.key, error=f"the server's replies were malformed or broken off: {reason}")

    def _ask(self, request: Request) -> Any:
        options: dict[str, Any] = {"max_tokens": request.max_new_tokens, "temperature": request.temperature}
        if request.temperature:
            options["seed"] = request.seed % 2**31
        text = self._text(request.prompt)
        if self.chat:
            options |= (
                {"chat_template_kwargs": self.settings.chat_template_kwargs}
                if self.settings.chat_template_kwargs
                else {}
            )
            ask = partial(self._client.chat.completions.create, messages=[{"role": "user", "content": text}])
        else:
            options["stop"] = list(STOPS[:NUM_STOPS])
            ask = partial(self._client.completions.create, prompt=text)
        while True:
            named = {self._instead.get(name, name): value for name, value in options.items()}
            named.pop("", None)
            try:
                return ask(model=self.settings.model, extra_body=named)
            except REFUSALS as error:
                self._go_without(refused_option(error, named), error)

    def _go_without(self, option: str, error: openai.APIStatusError) -> None:
        """From now on send something else.

        Raises:
            EngineError: there is nothing else, so that no request can succeed: a setting is wrong.
            openai.APIStatusError: no option was refused but the request.
        """
        if NO_TEMPLATE.search(str(error)):
            raise self._server_error(error, "set summarize.prompt_style=plain")
        if not option:
            raise error
        if option not in FALLBACK_OPTIONS:
            raise self._server_error(error, SETTINGS[option], f"refuses the option {option}: ")
        if option not in self._instead:  # else another thread has just found out
            self._instead[option] = FALLBACK_OPTIONS[option]
            log.warning(
                "%s refuses %s; going on %s (%s)",
                self._connection.address,
                f"{option} (summarize.{option})" if option == "chat_template_kwargs" else option,
                f"with {FALLBACK_OPTIONS[option]}" if FALLBACK_OPTIONS[option] else "without",
                self._connection.say(error),
            )

    def _count(self, text: str) -> int:
        """Tokens of a text; vLLM, SGLang and llama.cpp have ``/tokenize`` beside ``/v1``."""
        if self._counts_tokens:
            body, reply = {"model": self.settings.model, "prompt": text, "content": text}, None
            try:
                reply = self._connection.post("/tokenize", body)
            except openai.APIConnectionError as error:
                raise self._unreachable(error) from None
            except openai.APIStatusError as error:
                if error.status_code in UNAVAILABLE:
                    raise self._unreachable(error) from None
            except MALFORMED:
                pass
            match reply:
                case {"count": int(count)} if count > 0:
                    return count
                case {"tokens": list(tokens)}:
                    return len(tokens)
            self._counts_tokens = False
            log.warning("%s counts no tokens; taking %d bytes for one", self._connection.address, BYTES_PER_TOKEN)
        return len(text.encode()) // BYTES_PER_TOKEN


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
