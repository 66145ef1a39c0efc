"""An engine that is built for the first prompt: a task without work, or with all texts in the cache, loads no model."""

from __future__ import annotations

from collections.abc import Callable

from trsr_dist.summarize.requests import Completion, Engine, Request


class LazyEngine:
    """Stands for the engine that ``build`` makes.

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
