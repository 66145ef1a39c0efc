"""Log-odds from a server of the OpenAI protocol (vLLM, SGLang, ...): by completions, or by vLLM's /classify.

Prompts go as token ids, so that the server neither tokenizes nor wraps them. A completions server tells the
log-probabilities of both answers by their ids (vLLM's ``logprob_token_ids``), else those of the most probable tokens.
An answer that is not among them is appended to the prompt, whose log-probabilities the server is asked to echo.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trsr_dist.connection import MALFORMED, MAX_REPLY_BYTES, REFUSALS, Connection, describe, openai, refused_option
from trsr_dist.errors import ConfigError, EngineError
from trsr_dist.log import get_logger
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import ServerSettings, TokenizedUser

PROMPTS_PER_REQUEST = 16
"""At most; fewer where many log-probabilities come back of each."""
BYTES_PER_LOGPROB = 64
"""Of a reply, about: a token's name and its value."""
LEAST_LOGPROB = -9999.0
"""What servers write for minus infinity."""
OPTIONAL = ("logprob_token_ids", "return_tokens_as_token_ids", "return_token_ids", "add_special_tokens")
"""Fields beyond OpenAI's protocol; servers that refuse them are asked without."""
PROTOCOLS = {"completions": "/v1/completions", "classify": "/classify"}

log = get_logger("predict")


@dataclass(frozen=True, slots=True)
class Answered:
    """What a server says of one prompt."""

    score: float
    """Log-odds of yes; NaN where ``problem`` says why."""
    problem: str = ""
    token_ids: tuple[int, ...] = ()
    """That the server has read; empty where it does not say."""
    num_tokens: int = 0
    """Likewise; 0 where it does not say."""


class RefusedError(EngineError):
    """The server works and does not take such a request."""


class ScoreServer:
    """Asks a server for the log-odds of yes; safe to use from several threads.

    Args:
        settings: of the requests.
        builder: of the model's prompts: answers, and whether texts get special tokens.

    Raises:
        ConfigError: no address, or no such model there.
        EngineError: the server does not answer.
    """

    def __init__(self, settings: ServerSettings, builder: PromptBuilder) -> None:
        self.settings = settings
        self._connection = Connection(settings.address, settings.timeout_seconds, settings.max_retries, "--server")
        self.address = self._connection.address
        self._builder = builder
        self._slots = threading.BoundedSemaphore(settings.max_in_flight)
        self._left_out: set[str] = set()
        """Optional fields that the server refuses."""
        self.entry = self._find_model()
        """What the server says of the model."""
        self.model = str(self.entry["id"])
        self.protocol = settings.protocol if settings.protocol != "auto" else self._find_protocol()

    @property
    def identity(self) -> dict[str, Any]:
        """What scores depend on, as far as the server tells it."""
        known = {name: self.entry.get(name) for name in ("id", "root", "parent", "max_model_len")}
        return {"address": self.address, "protocol": self.protocol, **known}

    def score_users(self, users: Sequence[TokenizedUser]) -> Iterator[np.ndarray]:
        """float32 log-odds of every user's candidates, in their order; several users are asked for at the same time.

        Raises:
            EngineError: the server fails for good, or does not tell an answer's log-probability.
        """
        num_threads = self.settings.max_in_flight
        leads, rest = ThreadPoolExecutor(num_threads), ThreadPoolExecutor(num_threads)
        try:
            futures = [leads.submit(self._score_user, user, rest) for user in users]
            for future in futures:
                yield self.wait(future)
        finally:
            for pool in (leads, rest):
                pool.shutdown(wait=False, cancel_futures=True)

    def _score_user(self, user: TokenizedUser, pool: ThreadPoolExecutor) -> np.ndarray:
        """The first candidate alone: its prompt leaves the prefix in the server's cache for the others."""
        prompts = [[*user.prefix, *suffix] for suffix in user.suffixes]
        found = self.ask(prompts[:1])
        fitting = MAX_REPLY_BYTES // (BYTES_PER_LOGPROB * self.settings.top_logprobs)
        size = max(1, min(PROMPTS_PER_REQUEST, fitting))
        groups = [prompts[i : i + size] for i in range(1, len(prompts), size)]
        for future in [pool.submit(self.ask, group) for group in groups]:
            found += self.wait(future)
        problem = next((f"candidates[{i}]: {entry.problem}" for i, entry in enumerate(found) if entry.problem), "")
        if problem:
            raise EngineError(f"{self.address}: request {user.user!r}, {problem}")
        return np.array([entry.score for entry in found], dtype=np.float32)

    def wait(self, future: Future) -> Any:
        """The result of a thread; a server that drips a header for ever is noticed meanwhile."""
        while True:
            try:
                return future.result(self.settings.timeout_seconds)
            except NotYet:
                if future.done():
                    raise
                self._connection.limits.check()

    def ask(self, prompts: Sequence[Sequence[int] | str]) -> list[Answered]:
        """Score prompts in one request, or in a few where answers are not among the most probable tokens.

        Args:
            prompts: all as token ids, or all as texts, which the server tokenizes.

        Raises:
            EngineError: the server fails for good.
        """
        read = self._read_classes if self.protocol == "classify" else self._read_completions
        body = {"input" if self.protocol == "classify" else "prompt": prompts[0] if len(prompts) == 1 else prompts}
        if isinstance(prompts[0], str):
            body["add_special_tokens"] = self._builder.style == "plain"
        if self.protocol == "classify":
            return self._request(body | {"use_activation": False}, lambda reply: read(reply, prompts))
        wanted = {"logprobs": self.settings.top_logprobs, "logprob_token_ids": list(self._builder.answer_ids)}
        return self._request(body | self._one_token() | wanted, lambda reply: read(reply, prompts))

    def tokenize(self, body: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Token ids by the server's ``/tokenize``; None where it has none."""
        try:
            reply = self._connection.post("/tokenize", {"model": self.model, **body})
            return tuple(map(int, reply["tokens"]))
        except (openai.OpenAIError, *MALFORMED):
            return None

    def _one_token(self) -> dict[str, Any]:
        return {"max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True, "return_token_ids": True}

    def _read_completions(self, reply: Any, prompts: Sequence[Sequence[int] | str]) -> list[Answered]:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(prompts):
            raise ValueError(f"{len(choices)} choices for {len(prompts)} prompts")
        usage = (reply.get("usage") or {}).get("prompt_tokens") if len(prompts) == 1 else 0
        return [self._answered(*pair, int(usage or 0)) for pair in zip(choices, prompts, strict=True)]

    def _answered(self, choice: dict[str, Any], prompt: Sequence[int] | str, num_tokens: int) -> Answered:
        most_probable = choice["logprobs"]["top_logprobs"][0]
        token_ids = tuple(choice.get("prompt_token_ids") or ())
        found = [most_probable.get(f"token_id:{token}") for token in self._builder.answer_ids]
        if not any(name.startswith("token_id:") for name in most_probable):
            found = [most_probable.get(text) for text in self._own_texts]
        for place, value in enumerate(found):
            if value is None and not isinstance(prompt, str):
                found[place] = self._echoed(prompt, place)
            if found[place] is None:
                return Answered(math.nan, self._missing(place), token_ids, num_tokens or len(token_ids))
        yes, no = (-math.inf if value <= LEAST_LOGPROB else float(value) for value in found)
        return Answered(yes - no, "", token_ids, num_tokens or len(token_ids))

    @cached_property
    def _own_texts(self) -> list[str | None]:
        """Texts of the answers, by which some servers name tokens; None where another token has the same text."""
        tokenizer = self._builder.tokenizer
        counts = Counter(tokenizer.batch_decode([[token] for token in range(len(tokenizer))]))
        texts = [tokenizer.decode([token]) for token in self._builder.answer_ids]
        return [text if counts[text] == 1 else None for text in texts]

    def _echoed(self, prompt: Sequence[int], place: int) -> float | None:
        """Log-probability of an answer as the last token of a prompt; None where the server echoes none. A server that
        fails raises, as it does for any other request."""

        def read(reply: Any) -> float | None:
            logprobs = reply["choices"][0].get("logprobs") or {}
            tokens, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
            is_there = len(prompt) < min(len(tokens), len(values)) and tokens[len(prompt)] in names
            return values[len(prompt)] if is_there else None

        token = self._builder.answer_ids[place]
        names = (f"token_id:{token}", self._builder.tokenizer.decode([token]))
        body = {"prompt": [*prompt, token], "echo": True, "logprobs": 1}
        try:
            return self._request(body | self._one_token(), read)
        except RefusedError:
            return None

    def _missing(self, place: int) -> str:
        return (
            f"no log-probability of {self._builder.answers[place]!r} (token {self._builder.answer_ids[place]}): it is "
            f"not among the {self.settings.top_logprobs} most probable tokens, and the server neither takes "
            f"logprob_token_ids nor echoes prompts; update vLLM, or start it with --max-logprobs "
            f"{len(self._builder.tokenizer)} and ask with --top-logprobs {len(self._builder.tokenizer)}"
        )

    def _read_classes(self, reply: Any, prompts: Sequence[Sequence[int] | str]) -> list[Answered]:
        rows = sorted(reply["data"], key=lambda row: row["index"])
        if len(rows) != len(prompts):
            raise ValueError(f"{len(rows)} rows for {len(prompts)} prompts")
        sizes = {len(row["probs"]) for row in rows}
        if sizes != {1}:
            raise EngineError(
                f"{self.address}: the classifier has {max(sizes)} labels, expected one whose logit is the log-odds; "
                "serve what tools/merge_lora.py --head classifier writes"
            )
        usage = (reply.get("usage") or {}).get("prompt_tokens") if len(prompts) == 1 else 0
        return [Answered(float(row["probs"][0]), num_tokens=int(usage or 0)) for row in rows]

    def _find_model(self) -> dict[str, Any]:
        """The entry of the model in the server's list."""
        name = self.settings.served_model
        with self._telling():
            try:
                entries = [dict(entry) for entry in self._connection.models()["data"]]
            except openai.NotFoundError:
                entries = [{"id": name}] if name else []
        names = [str(entry.get("id")) for entry in entries]
        if (name and name not in names) or (not name and len(names) != 1):
            what = f"has no model {name!r}" if name else f"lists {len(names)} models"
            raise ConfigError(f"{self.address}: {what} ({', '.join(names)}); name the right one with --served-model")
        return entries[names.index(name) if name else 0]

    def _find_protocol(self) -> str:
        """The one that answers: servers have either completions or a classifier, as the model is."""
        refusals = []
        for protocol, path in PROTOCOLS.items():
            prompt = self._builder.encode("x")
            body = {"input": prompt} if protocol == "classify" else {"prompt": prompt, "max_tokens": 1}
            with self._telling():
                try:
                    self._connection.post(path, {"model": self.model, **body})
                except (openai.NotFoundError, *REFUSALS) as error:
                    refusals.append(f"{path}: {describe(error)}")
                else:
                    return protocol
        raise EngineError(
            f"{self.address}: {self._connection.say('; '.join(refusals))}; serve the merged folder with vLLM"
        )

    def _request(self, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """What ``read`` makes of the reply; one that is no whole answer is asked for again."""
        path = PROTOCOLS[self.protocol]

        def ask() -> Any:
            with self._telling():
                reply = self._post(path, body)
            return read(reply)

        try:
            return self._connection.until_whole(ask)
        except MALFORMED as error:
            words = self._connection.say(error)
            raise EngineError(f"{self.address}: no scores in the replies of {path}: {words}") from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        while True:
            asked = {name: value for name, value in body.items() if name not in self._left_out}
            try:
                with self._slots:
                    return self._connection.post(path, {"model": self.model, **asked})
            except REFUSALS as error:
                option = refused_option(error, asked)
                if option not in OPTIONAL:
                    raise
                log.info("%s refuses %s; going on without", self.address, option)
                self._left_out.add(option)
            finally:
                self._connection.limits.end()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Errors of the client become ours, with what may help and without secrets."""
        try:
            yield
        except openai.OpenAIError as error:
            kind, remedy = EngineError, "check --server, and that the server runs"
            if isinstance(error, openai.APITimeoutError):
                remedy = "lower --max-in-flight or raise --timeout-seconds"
            elif isinstance(error, REFUSALS):
                remedy = "serve with a larger --max-model-len, or change the option that the server names"
                kind = RefusedError
            raise kind(f"{self.address}: {self._connection.say(error)}; {remedy}") from None
        except MALFORMED as error:
            raise EngineError(
                f"{self.address}: {self._connection.say(f'no such reply as expected ({error})')}"
            ) from None
