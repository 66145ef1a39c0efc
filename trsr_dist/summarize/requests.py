"""What passes between the scheduler and an engine. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trsr_dist.prompts.text import SummaryPrompt

WHOLE = ("stop", "eos", "length", None)
"""Why a text ended, in the words of the servers: by itself or at the token limit; any other reason broke it off."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What engines that ask a model are made of: the settings of the same names."""

    model: str
    """Folder, hub id, or the server's name."""
    revision: str
    """Of a hub model; empty: the default branch."""
    base_url: str
    trust_remote_code: bool
    precision: str
    cuda_graphs: bool
    prompt_style: str
    chat_template_kwargs: Mapping[str, Any]
    max_prompt_tokens: int
    max_new_tokens: int
    max_in_flight: int
    timeout_seconds: float
    max_retries: int


@dataclass(frozen=True, slots=True)
class Request:
    """One text to be generated."""

    key: str
    """Hash of all that the text depends on."""
    prompt: SummaryPrompt
    """Untrimmed."""
    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    """Of the sampling; without effect when greedy."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An engine's answer to one request."""

    key: str
    text: str = ""
    cut: bool = False
    """The token limit ended the text."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    words_cut: int = 0
    """Trimmed from the prompt, so that it kept to the token limit."""
    generated: bool = True
    """A model wrote it, which may have begun with its thoughts and gone on with turns that it made up."""
    error: str = ""
    """Why there is no text, for good; empty where there is one."""


class Engine(Protocol):
    """Takes requests while others are running and hands out completions as they come, in any order."""

    capacity: int
    """Requests worth having in flight; may shrink."""

    def submit(self, request: Request) -> None:
        """Take a request; returns at once. Its prompt is trimmed to the token limit, or fails."""

    def poll(self) -> list[Completion]:
        """Completions since the last call; waits for one while any request is in flight.

        Raises:
            EngineError: the engine itself is gone.
        """

    def close(self) -> None:
        """Release threads, connections and memory."""


class LazyEngine:
    """An engine that is built for the first prompt: a task without work, or with all texts cached, loads no model.

    Args:
        build: raises what building raises, out of the first ``submit``.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._build = build
        self._engine: Engine | None = None

    @property
    def capacity(self) -> int:
        return 1 if self._engine is None else self._engine.capacity

    def submit(self, request: Request) -> None:
        if self._engine is None:
            self._engine = self._build()
        self._engine.submit(request)

    def poll(self) -> list[Completion]:
        return [] if self._engine is None else self._engine.poll()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
