"""The records and the names of metrics and losses that cross stage borders. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("recall", "mrr", "ndcg")
"""Of ranking metrics."""
ROUTES = {
    "tokens": "prompts as token ids, as tools/predict.py sends them",
    "text": "prompts as text, which the server tokenizes",
    "chat": "messages, which the server puts into its chat template (by its /tokenize)",
}
"""Ways in which prompts reach a server."""


@dataclass(frozen=True, slots=True)
class Item:
    """A catalogue item as the prompts see it."""

    id: str
    text: str
    """The chosen fields in one line, white space normalized; never the raw id."""
    category: str = ""
    """Used by category-hard negatives and by the evaluation's slices; empty where unknown."""


@dataclass(frozen=True, slots=True)
class UserLog:
    """One user as a reader of raw data yields it: everything before the target, then the target."""

    user: str
    history: tuple[str, ...]
    """Item ids, oldest first; holds only what came before the targets."""
    targets: tuple[str, ...]
    """Item ids of the next interaction: usually one."""
    time: int = 0
    """Unix seconds of the target, 0 where the data has no time."""
    shown: tuple[str, ...] = ()
    """Item ids shown to the user together with the target and not chosen (impressions)."""
    row: int = 0
    """Of the log, from 1."""
    problem: str = ""
    """What is wrong with the row; it does not count where an earlier row of the user does."""
    counted: str = ""
    """Name of a count of the rows that count."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One item to be scored for a user."""

    item: str
    text: str
    label: int
    """1 for a target, 0 for a negative."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One user in a shard: all that is needed to write the user's prompts."""

    user: str
    instruction: str
    summary: str
    recent: tuple[str, ...]
    """Texts of the most recent items, oldest first."""
    candidates: tuple[Candidate, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    """Block ids, engine, model, prompt hash, decoding, seed, history item ids and flags."""


@dataclass(frozen=True, slots=True)
class TokenizedUser:
    """A user's prompts: candidate i reads ``prefix + suffixes[i]``."""

    user: str
    prefix: tuple[int, ...]
    """Longest common token prefix of all the user's prompts, short of at least one token of each."""
    suffixes: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    items: tuple[str, ...]
    trims: dict[str, int] = field(default_factory=dict)
    """What was cut to fit the token limit; empty where nothing was."""

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.suffixes))

    def choose(self, candidates: Sequence[int]) -> TokenizedUser:
        """The same user with some of the candidates, in the given order."""
        return TokenizedUser(
            self.user,
            self.prefix,
            tuple(self.suffixes[i] for i in candidates),
            tuple(self.labels[i] for i in candidates),
            tuple(self.items[i] for i in candidates),
            self.trims,
        )


RANKING_LOSSES = ("pairwise", "listwise", "distill")
"""Values of ``train.loss`` that compare a user's candidates: averaged over users, and their scores have no scale."""


def has_scale(loss: str | None) -> bool:
    """Whether the loss of a training made the scores log-odds of yes; an unknown one is taken for such."""
    return loss not in RANKING_LOSSES


def metric_names(top_k: Sequence[int]) -> list[str]:
    """Names in the order of the tables: recall@3, ..., mrr@3, ..., ndcg@3, ..., auc."""
    return [f"{family}@{k}" for family in FAMILIES for k in top_k] + ["auc"]


def headline(top_k: tuple[int, ...]) -> str:
    """The metric of the sentences and figures that show one only."""
    return f"recall@{top_k[len(top_k) // 2]}"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server that has the model is asked; the one owner of these defaults."""

    address: str
    """``http://host:8000``, with ``/v1`` or without."""
    served_model: str = ""
    """The server's name of the model; empty: its only one."""
    protocol: str = "auto"
    """``completions``, ``classify``, or ``auto``: the one of them that the server has."""
    max_in_flight: int = 16
    """Requests at the same time."""
    timeout_seconds: float = 300.0
    """Of one try."""
    max_retries: int = 4
    """Of one request."""
    top_logprobs: int = 20
    """Most probable tokens that a server without ``logprob_token_ids`` is asked for."""
