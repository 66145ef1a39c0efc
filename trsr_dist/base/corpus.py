"""The documents that a small base is pre-trained on: the train users' side only, and nothing of their labels. Pure.

A share of them (``base.prompt_share``) are the recommender's own prompts. Their candidate comes from the user's own
history or from anyone's, and the answer is drawn at random: the base learns where an answer stands and which two words
it may be, not which one is right. The others are item texts, histories as lists, and summaries with the history that
they were made of: topics recur in them, so that the base learns to look up what it has read before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from trsr_dist.hashing import random_stream
from trsr_dist.prompts.text import recommend_text
from trsr_dist.records import Candidate, Sample

OWN_SHARE = 0.5
"""Share of the prompts whose candidate is from the user's own history. With none the base learns that a candidate has
nothing to do with what stands before it."""
LISTED_ITEMS = 12
"""Of a listed history, the latest."""


class TrainTexts(Protocol):
    """Texts of the train users."""

    def __len__(self) -> int:
        """Number of users."""

    def sample(self, user: int) -> Sample:
        """A user's sample, of which the candidates are not looked at."""

    def history(self, sample: Sample) -> list[str]:
        """Item texts of the sample's user, oldest first, without the target; not empty."""


@dataclass(frozen=True, slots=True)
class PromptDocument:
    """A prompt with one candidate, and an answer that has nothing to do with them."""

    sample: Sample
    answer: int
    """Index into the two answers."""


Document = PromptDocument | str


class Corpus:
    """An endless list of documents; each depends on its number and the seed alone.

    Args:
        texts: of the train users.
        prompt_share: share of prompts among the documents.
        seed: of the run.
    """

    def __init__(self, texts: TrainTexts, prompt_share: float, seed: int) -> None:
        self._texts = texts
        self._prompt_share = prompt_share
        self._seed = seed

    def document(self, number: int) -> Document:
        """Document ``number``, from 0."""
        draw = random_stream(self._seed, "base document", number)
        sample = self._any_sample(draw)
        if draw.random() < self._prompt_share:
            other = sample if draw.random() < OWN_SHARE else self._any_sample(draw)
            text = draw.choice(self._texts.history(other))
            return PromptDocument(replace(sample, candidates=(Candidate("", text, 0),)), draw.randrange(2))
        history = self._texts.history(sample)
        latest = "\n".join(f"- {text}" for text in history[-LISTED_ITEMS:])
        return draw.choice((draw.choice(history), latest, f"{sample.summary}\n\n{latest}".strip()))

    def documents(self, start: int, stop: int) -> Iterator[Document]:
        """Documents ``start`` to ``stop - 1``."""
        return map(self.document, range(start, stop))

    def _any_sample(self, draw: random.Random) -> Sample:
        return self._texts.sample(draw.randrange(len(self._texts)))


def document_text(document: Document, answers: tuple[str, str]) -> str:
    """The document in plain text."""
    if isinstance(document, str):
        return document
    sample = document.sample
    prompt = recommend_text(sample.instruction, sample.summary, sample.recent, sample.candidates[0].text)
    return f"{prompt} {answers[document.answer]}"
