"""A trained model that ranks any candidates for any user, all given as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trsr_dist.config.sections import PromptSection
from trsr_dist.distributed import device_of
from trsr_dist.environment import detect_ranks
from trsr_dist.errors import ConfigError, DataError, ModelError
from trsr_dist.evaluate.parts import PartScorer
from trsr_dist.log import get_logger
from trsr_dist.model.loading import LoadedModel, ModelPrompts, open_model, open_prompts, resolve_precision
from trsr_dist.model.recommender import score_row
from trsr_dist.predict.prefixes import PrefixCache
from trsr_dist.prompts.text import one_line, recommend_instruction
from trsr_dist.records import Candidate, Sample, ServerSettings, TokenizedUser
from trsr_dist.summarize.extract import extract
from trsr_dist.summarize.plans import planner, writer
from trsr_dist.summarize.plans.graph import Plan, node_prompt
from trsr_dist.words import has_text

if TYPE_CHECKING:
    from trsr_dist.predict.server import ScoreServer

PREFIX_CACHE_MB = 256
REQUESTS_PER_BATCH = 64
"""Requests whose prompts are packed into rows together."""

EXTRACTIVE = "extractive"

log = get_logger("predict")


@dataclass(frozen=True, slots=True)
class Request:
    """One user and the candidates to rank."""

    candidates: tuple[str, ...]
    """Texts, written as the item texts of the training were."""
    items: tuple[str, ...] = ()
    """Texts of what the user chose so far, oldest first."""
    summary: str | None = None
    """A ready summary of the user's preferences; None: it is made of the items, by frequency, without a model."""
    name: str = ""
    """For messages."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate in its place."""

    text: str
    score: float
    """Log-odds logit(yes) - logit(no), float32."""
    index: int
    """Position among the request's candidates."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """A request's answer."""

    candidates: tuple[Ranked, ...]
    """By falling score; equal scores stay in the given order."""
    summary: str
    """That the model was shown."""
    trims: dict[str, int]
    """What was cut to fit the token limit; empty where nothing was."""


@dataclass(frozen=True, slots=True)
class HistorySettings:
    """How the training's shards were made, as far as it is recorded with the model."""

    scheme: str = "hierarchical"
    block_size: int = 5
    fan_in: int = 8
    max_words: int = 150
    """Length limit of a summary."""
    engine: str = EXTRACTIVE
    """That wrote the training's summaries."""
    max_items: int = 0
    """Longer histories are cut to their latest items; 0: none is."""

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> HistorySettings:
        """From a model's provenance; the defaults where it holds none."""
        config = provenance.get("config", {})
        recorded = config.get("summarize", {})
        values = {name: recorded[name] for name in ("scheme", "block_size", "fan_in", "engine") if name in recorded}
        if "max_new_tokens" in recorded:
            values["max_words"] = recorded["max_new_tokens"]
        return cls(**values, max_items=config.get("data", {}).get("max_history", 0))

    def cut(self, items: Sequence[str]) -> Sequence[str]:
        """The latest items that count."""
        return items[-self.max_items :] if self.max_items else items

    def plan(self, num_items: int) -> Plan:
        """The prompts of that many items; empty where the scheme asks no engine."""
        return planner(self.scheme)(num_items, self.block_size, self.fan_in)


class Ranker:
    """Ranks candidates by the log-odds of yes, with the prompts, the trimming and the answers of the training.

    Args:
        loaded: model, tokenizer and prompts; see ``open``. The prompts alone where a server has the model.
        row_tokens: length limit of a packed row, in tokens. Memory grows with it.
        server: that scores in this process's place; see ``connect``.
        prefix_cache_mb: see ``open``.

    Example:
        >>> ranker = Ranker.open("runs/quickstart/merged")
        >>> request = Request(items=("title: Tea", "title: Cups"), candidates=("title: Tyre", "title: Teapot"))
        >>> ranker.rank(request).candidates
        (Ranked(text='title: Teapot', score=1.87, index=1), Ranked(text='title: Tyre', score=-2.31, index=0))
    """

    def __init__(
        self,
        loaded: LoadedModel | ModelPrompts,
        row_tokens: int = 8192,
        server: ScoreServer | None = None,
        prefix_cache_mb: int = PREFIX_CACHE_MB,
    ) -> None:
        self.builder = loaded.builder
        self.domain: str = loaded.provenance.get("domain", "items")
        self.history = HistorySettings.of(loaded.provenance)
        self.server = server
        if server is not None:
            self.score_users = server.score_users
        elif prefix_cache_mb and loaded.model.shares_prefix:
            self.score_users = PrefixCache(loaded.model, row_tokens, prefix_cache_mb << 20).score_users
        else:
            self.score_users = partial(score, loaded.model, row_tokens)
        """Log-odds of the candidates of tokenized users."""
        self._has_warned = False

    @classmethod
    def open(
        cls,
        name_or_path: str,
        device: str = "auto",
        precision: str = "auto",
        attention: str = "auto",
        row_tokens: int = 8192,
        trust_remote_code: bool = False,
        prefix_cache_mb: int = PREFIX_CACHE_MB,
    ) -> Ranker:
        """Load a model.

        Args:
            name_or_path: merged folder, checkpoint, adapter, or any causal language model.
            device: such as ``cpu`` or ``cuda:1``; auto: a GPU where there is one.
            precision: float32 or bfloat16; auto: bfloat16 on a GPU that has it, else float32.
            attention: back end of the shared-prefix attention, see ``model.attention``.
            row_tokens: length limit of a packed row, in tokens.
            trust_remote_code: run model code from the hub.
            prefix_cache_mb: memory (MiB) for keys and values of the users ranked last, so that other candidates of
                theirs cost these alone; scores move by rounding. 0: none are kept.

        Raises:
            ConfigError: there is no such device.
            ModelError: the model cannot be read.
            CheckpointError: an incomplete or damaged checkpoint.
        """
        place = choose_device(device)
        dtype = getattr(torch, resolve_precision(precision, place))
        prompt = PromptSection().model_dump()
        loaded = open_model(name_or_path, place, dtype, prompt, attention, trust_remote_code)
        warn_of_prompts(name_or_path, loaded.provenance)
        return cls(loaded, row_tokens, prefix_cache_mb=prefix_cache_mb)

    @classmethod
    def connect(cls, server: str | ServerSettings, name_or_path: str, trust_remote_code: bool = False) -> Ranker:
        """Rank through a server; no weights are loaded here.

        Args:
            server: its address and how it is asked; an address alone will do.
            name_or_path: the merged folder (or checkpoint, or adapter) that it serves, for tokenizer and prompts.
            trust_remote_code: run the tokenizer's code from the hub.

        Raises:
            ConfigError: no address of a server, several models there and none named, or openai is not installed.
            EngineError: the server does not answer.
            ModelError: the tokenizer cannot be read.
        """
        from trsr_dist.predict.server import ScoreServer

        prompts = open_prompts(name_or_path, PromptSection().model_dump(), trust_remote_code)
        warn_of_prompts(name_or_path, prompts.provenance)
        settings = ServerSettings(server) if isinstance(server, str) else server
        return cls(prompts, server=ScoreServer(settings, prompts.builder))

    def rank(self, request: Request) -> Ranking:
        """Rank one request's candidates.

        Raises:
            DataError: no candidates, an empty text, or a prompt whose instruction alone is too long.
            ModelError: a score is not finite.
        """
        return next(self.rank_many([request]))

    def rank_many(self, requests: Iterable[Request]) -> Iterator[Ranking]:
        """The same for many requests, in their order; several share a forward pass, or are at the server together."""
        waiting = iter(requests)
        while batch := list(islice(waiting, REQUESTS_PER_BATCH)):
            samples = [self.sample(request) for request in batch]
            users = [self.builder.build(sample) for sample in samples]
            for request, sample, user, scores in zip(batch, samples, users, self.score_users(users), strict=True):
                yield Ranking(by_score(request, scores), sample.summary, user.trims)

    def prompts(self, request: Request) -> list[str]:
        """What the model reads, one text a candidate; trimming, which is done on tokens, left out."""
        return self.builder.texts(self.sample(request))

    def sample(self, request: Request) -> Sample:
        """The request as a sample of a shard."""
        items = self.history.cut(texts_of(request, "items", request.items))
        texts = texts_of(request, "candidates", request.candidates)
        if not texts:
            raise DataError(f"request {request.name!r}: no candidates; give one text or more")
        return Sample(
            user=request.name,
            instruction=recommend_instruction(self.domain),
            summary=self._summary(request, items),
            recent=tuple(items),
            candidates=tuple(Candidate(str(number), text, 0) for number, text in enumerate(texts)),
        )

    def _summary(self, request: Request, items: Sequence[str]) -> str:
        if request.summary is not None:
            return one_line(request.summary)
        if self.history.engine != EXTRACTIVE and self.history.plan(len(items)) and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the model was trained on summaries of the engine %r and sees extractive ones here; give ready ones "
                "of that engine for scores like the evaluation's",
                self.history.engine,
            )
        return summarize_items(items, self.history, self.domain, self.builder.recent_items)


def score(model: torch.nn.Module, row_tokens: int, users: Sequence[TokenizedUser]) -> list[np.ndarray]:
    """float32 log-odds of every user's candidates by a model in this process, a ``Recommender``."""
    part, device = PartScorer(users, row_tokens), next(model.parameters()).device
    for number, row in enumerate(part.rows()):
        part.take(number, score_row(model, row, device))
    return part.scores()


def warn_of_prompts(name: str, provenance: Mapping[str, Any]) -> None:
    if "prompt" not in provenance:
        log.warning("%s: records no prompts of a training; the default ones are used", name)


def summarize_items(items: Sequence[str], settings: HistorySettings, domain: str, num_recent: int) -> str:
    """The extractive summary of item texts, oldest first, or what the scheme has in its place; empty without items.

    Args:
        items: texts of the history.
        settings: of the training.
        domain: wording of the prompts.
        num_recent: number of the latest items that stand in the recommender's prompt already.
    """
    plan = settings.plan(len(items))
    if not plan:
        return writer(settings.scheme)(items, num_recent, settings.max_words)
    texts: list[str] = []
    for node in plan:
        prompt = node_prompt(node, items, [texts[parent] for parent in node.parents], domain)
        texts.append(extract(prompt, settings.max_words))
    return texts[-1]


def choose_device(name: str) -> torch.device:
    """A device that is here; auto: a GPU where there is one.

    Raises:
        ConfigError: it is not, or it is none.
    """
    if name == "auto":
        return device_of(detect_ranks())
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r}: not there ({reason}); expected cpu, cuda, cuda:1 or the like") from None


def texts_of(request: Request, field: str, texts: Sequence[str]) -> tuple[str, ...]:
    """The texts with white space normalized, as the data preparation does it.

    Raises:
        DataError: one is empty.
    """
    clean = tuple(map(one_line, texts))
    place = next((i for i, text in enumerate(clean) if not has_text(text)), None)
    if place is not None:
        raise DataError(f"request {request.name!r}: {field}[{place}] is empty; every item needs a text")
    return clean


def by_score(request: Request, scores: np.ndarray) -> tuple[Ranked, ...]:
    """Candidates by falling score.

    Raises:
        ModelError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        place = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ModelError(
            f"request {request.name!r}, candidates[{place}]: score {scores[place]} is not finite; the model diverged "
            "or its precision overflows (try float32)"
        )
    order = np.argsort(-scores, kind="stable").tolist()
    return tuple(Ranked(request.candidates[place], float(scores[place]), place) for place in order)
