"""The engine without a model: deterministic, immediate, standard library only."""

from __future__ import annotations

from trsr_dist.summarize.extract import extract
from trsr_dist.summarize.requests import Completion, Request
from trsr_dist.words import split_words


class ExtractiveEngine:
    """Lists what a user's items have in common.

    Args:
        capacity: requests between two polls.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._done: list[Completion] = []

    def submit(self, request: Request) -> None:
        text = extract(request.prompt, request.max_new_tokens)
        self._done.append(Completion(request.key, text, new_tokens=len(split_words(text)), generated=False))

    def poll(self) -> list[Completion]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self._done.clear()
