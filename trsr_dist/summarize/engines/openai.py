"""Any OpenAI-compatible server (vLLM serve, SGLang, llama.cpp) through the ``openai`` client.

The client retries connection errors, time-outs, 408, 409, 429 and 5xx with growing waits. What it does not retry, a
reply that is no valid or no whole answer, is retried here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import openai

from trsr_dist.environment import secret, server_address
from trsr_dist.errors import ConfigError, DataError, EngineError
from trsr_dist.log import get_logger
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.quality import TURN_MARKERS
from trsr_dist.summarize.requests import WHOLE, Completion, Request
from trsr_dist.summarize.trimming import trim_prompt

KEY_VARIABLE = "OPENAI_API_KEY"
TEMPLATE_TOKENS = 64
"""Kept free for the server's chat template (Llama 3's adds 36)."""
BYTES_PER_TOKEN = 3
"""Assumed where the server cannot count tokens: fewer than with most tokenizers, so that prompts fit."""
NUM_STOPS = 4
"""The most that the protocol allows."""
FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
"""Wrong key, address or model: no request can succeed."""
UNKNOWN_FIELD = (openai.BadRequestError, openai.UnprocessableEntityError)
UNAVAILABLE = (429, 502, 503, 504)
"""A rate limit, or a proxy whose server is gone: never the prompt's fault."""

log = get_logger("summarize")


class OpenAIEngine:
    """Sends requests from a pool of threads; the key comes from the environment alone.

    Args:
        base_url: address of the server, ending in ``/v1``; empty: ``OPENAI_BASE_URL``.
        model: the server's name for the model.
        prompt_style: ``plain``: the completions protocol; otherwise the chat protocol with the server's template.
        template_kwargs: variables of the server's chat template; left out for servers that refuse them.
        max_prompt_tokens: longer prompts are trimmed.
        max_in_flight: concurrent requests.
        timeout_seconds: of one try.
        max_retries: of one request.

    Raises:
        ConfigError: no address is given.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        prompt_style: str,
        template_kwargs: Mapping[str, Any],
        max_prompt_tokens: int,
        max_in_flight: int,
        timeout_seconds: float,
        max_retries: int,
    ) -> None:
        address = base_url or server_address()
        if not address:
            raise ConfigError(
                "summarize.base_url is empty: engine=openai needs the server's address, http://host:8000/v1"
            )
        self.capacity = max_in_flight
        self.model = model
        self.chat = prompt_style != "plain"
        self.template_kwargs = template_kwargs
        self.max_prompt_tokens = max_prompt_tokens
        self.max_retries = max_retries
        self._client = openai.OpenAI(
            base_url=address,
            api_key=secret(KEY_VARIABLE) or "none",
            timeout=timeout_seconds,
            max_retries=max_retries,
        )
        self._todo: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Completion | Exception] = queue.SimpleQueue()
        self._in_flight = 0
        self._error: Exception | None = None
        """What ends the job, once the completions that came with it are handed out."""
        self._counts_tokens = True
        for _ in range(max_in_flight):
            # Daemons: at the end of the process nothing waits for a server that hangs.
            threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, request: Request) -> None:
        self._in_flight += 1
        self._todo.put(request)

    def poll(self) -> list[Completion]:
        done = []
        while self._in_flight and (not (done or self._error) or not self._done.empty()):
            outcome = self._done.get()
            self._in_flight -= 1
            if isinstance(outcome, Exception):
                self._error = self._error or outcome
            else:
                done.append(outcome)
        if self._error is not None and not done:
            raise self._error
        return done

    def close(self) -> None:
        self._client.close()

    def _serve(self) -> None:
        while True:
            self._work(self._todo.get())

    def _work(self, request: Request) -> None:
        """In a thread: whatever happens, one outcome is put into the queue."""
        try:
            outcome = self._answer(request)
        except Exception as error:  # a reply of any form may come from a server
            outcome = EngineError(f"{self._client.base_url}: {type(error).__name__}: {error}")
        self._done.put(outcome)

    def _answer(self, request: Request) -> Completion | EngineError:
        try:
            prompt, words_cut = self._fit(request.prompt)
            return replace(self._ask_until_valid(replace(request, prompt=prompt)), words_cut=words_cut)
        except EngineError as error:
            return error
        except DataError as error:
            return Completion(request.key, error=str(error))
        except FATAL as error:
            return EngineError(f"{self._client.base_url}: {describe(error)}; check base_url, model and key")
        except openai.OpenAIError as error:
            return self._blame(request, error)

    def _fit(self, prompt: SummaryPrompt) -> tuple[SummaryPrompt, int]:
        """Trim by the server's token count. A token holds at least one byte, so short prompts need no counting.

        Raises:
            DataError: the instruction alone is over the limit.
            EngineError: the server is gone.
        """
        limit = self.max_prompt_tokens - TEMPLATE_TOKENS * self.chat
        if len(prompt.text().encode()) < limit:
            return prompt, 0
        return trim_prompt(prompt, lambda tried: self._count(tried.text()), limit)

    def _blame(self, request: Request, error: openai.OpenAIError) -> Completion | EngineError:
        """The request has failed, or the server is gone or too slow: then no request is at fault."""
        if isinstance(error, openai.APITimeoutError):
            return self._lost(error)
        if isinstance(error, openai.APIConnectionError) and not self._server_answers():
            return self._lost(error)
        if isinstance(error, openai.APIStatusError) and error.status_code in UNAVAILABLE:
            return self._lost(error)
        return Completion(request.key, error=describe(error))

    def _lost(self, error: openai.OpenAIError) -> EngineError:
        remedy = "start the server"
        if isinstance(error, openai.APITimeoutError):
            remedy = "lower summarize.max_in_flight or raise summarize.timeout_seconds"
        return EngineError(f"{self._client.base_url}: {describe(error)}; {remedy} and run the stage again")

    def _server_answers(self) -> bool:
        try:
            self._client.models.list()
        except openai.APIStatusError:
            return True
        except (ValueError, openai.OpenAIError) as error:
            return not isinstance(error, openai.APIConnectionError)
        return True

    def _ask_until_valid(self, request: Request) -> Completion:
        reason = ""
        for number in range(self.max_retries + 1):
            time.sleep(min(0.1 * 2**number, 5.0) if number else 0)
            try:
                return read_reply(request.key, self._ask(request))
            except (ValueError, openai.APIResponseValidationError) as error:
                reason = str(error)
        return Completion(request.key, error=f"the server's replies were malformed or broken off: {reason}")

    def _ask(self, request: Request) -> Any:
        options: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
        }
        if request.temperature:
            options["seed"] = request.seed % 2**31
        text = request.prompt.text()
        if self.chat:
            return self._chat(text, options)
        return self._client.completions.create(prompt=text, stop=list(TURN_MARKERS[:NUM_STOPS]), **options)

    def _chat(self, text: str, options: dict[str, Any]) -> Any:
        kwargs = self.template_kwargs
        ask = partial(self._client.chat.completions.create, messages=[{"role": "user", "content": text}], **options)
        try:
            return ask(extra_body={"chat_template_kwargs": kwargs} if kwargs else None)
        except UNKNOWN_FIELD as error:
            if not kwargs or "chat_template" not in str(error):
                raise
            if self.template_kwargs:
                self.template_kwargs = {}
                log.warning("%s takes no summarize.chat_template_kwargs; going on without", self._client.base_url)
            return ask()

    def _count(self, text: str) -> int:
        """Tokens of a text; vLLM, SGLang and llama.cpp have ``/tokenize`` beside ``/v1``."""
        if self._counts_tokens:
            number = self._ask_for_count(text)
            if number is not None:
                return number
            self._counts_tokens = False
            log.warning("%s counts no tokens; taking %d bytes for one", self._client.base_url, BYTES_PER_TOKEN)
        return len(text.encode()) // BYTES_PER_TOKEN

    def _ask_for_count(self, text: str) -> int | None:
        """The server's count; None where it has none to give."""
        root = str(self._client.base_url).rstrip("/").removesuffix("/v1")
        body = {"model": self.model, "prompt": text, "content": text}
        try:
            reply = self._client.with_options(base_url=root).post("/tokenize", cast_to=object, body=body)
        except openai.APIConnectionError as error:
            raise self._lost(error) from None
        except (openai.APIStatusError, ValueError):
            return None
        match reply:
            case {"count": int(count)}:
                return count
            case {"tokens": list(tokens)}:
                return len(tokens)
        return None


def read_reply(key: str, reply: Any) -> Completion:
    """The completion in a reply of either protocol.

    Raises:
        ValueError: the reply holds no text, or one that was aborted or filtered.
    """
    choices = getattr(reply, "choices", None)
    if not choices:
        raise ValueError(f"no choices in {str(reply)[:200]!r}")
    choice = choices[0]
    ending = getattr(choice, "finish_reason", None)
    if ending not in WHOLE:
        raise ValueError(f"finish_reason {ending!r}")
    message = getattr(choice, "message", None)
    text = getattr(message, "content", None) if message is not None else getattr(choice, "text", None)
    if text is None and ending == "length":
        text = ""  # all that was written are thoughts, which the server keeps apart
    if not isinstance(text, str):
        raise ValueError(f"no text in {str(reply)[:200]!r}")
    usage = getattr(reply, "usage", None)
    return Completion(
        key,
        text,
        cut=ending == "length",
        prompt_tokens=getattr(usage, "prompt_tokens", 0) or 0,
        new_tokens=getattr(usage, "completion_tokens", 0) or 0,
    )


def describe(error: openai.OpenAIError) -> str:
    """Kind of error and the server's words; never the request, which holds the key."""
    status = f" {error.status_code}" if isinstance(error, openai.APIStatusError) else ""
    return f"{type(error).__name__}{status}: {str(error)[:300]}"
