"""Is what a server serves what was trained? Its scores of real prompts are compared with those of the model here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from trsr_dist.bases import CONFIG
from trsr_dist.errors import ConfigError
from trsr_dist.files import read_json
from trsr_dist.merge.scores import read_users, users_to_compare
from trsr_dist.model.artifacts import follow, run_of
from trsr_dist.predict.diagnosis import (
    Ids,
    Local,
    Scores,
    Texts,
    diagnose,
    prompt_faults,
    texts_of,
    whole,
)
from trsr_dist.predict.server import Answered, ScoreServer
from trsr_dist.pretrained import BaseSource, local_source
from trsr_dist.records import Sample, TokenizedUser
from trsr_dist.run import MANIFEST

NUM_CANDIDATES = 8
"""Of each user, at most."""
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 0.25
"""Log-odds: of float32 on both sides, and where one side computes in 16 bits."""
TIE = 1e-4
"""Candidates of one user whose log-odds differ by less have no order."""


@dataclass(frozen=True, slots=True)
class RouteCheck:
    """One way in which prompts reach a server."""

    route: str
    num_prompts: int
    """Compared; 0 where ``note`` says why none is."""
    largest_difference: float = 0.0
    mean_difference: float = 0.0
    num_pairs: int = 0
    """Pairs of one user's candidates, ties left out."""
    order_changes: int = 0
    constant: bool = False
    """Every user's candidates get one score there, and not here."""
    missing_share: float = 0.0
    """Of prompts without a log-probability of both answers."""
    fault: str = ""
    """Empty: within the tolerance."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """What a server was found to serve."""

    server: dict[str, Any]
    prompts: str
    """Where the users come from."""
    num_users: int
    tolerance: float
    routes: list[RouteCheck]

    @property
    def is_equal(self) -> bool:
        """Whether every route that could be compared is within the tolerance, and at least one could."""
        compared = [route for route in self.routes if route.num_prompts]
        return bool(compared) and not any(route.fault for route in self.routes)

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"is_equal": self.is_equal}

    def lines(self) -> Iterator[str]:
        """A table, then what is wrong."""
        server = self.server
        yield f"{server['address']}, {server['protocol']} of {server['id']!r}: {self.num_users} users of {self.prompts}"
        yield (
            f"{'route':8}{'prompts':>8}{'largest':>11}{'mean':>11}{'order changes':>15}{'constant':>10}{'missing':>9}"
            f"  within {self.tolerance:g}"
        )
        for check in self.routes:
            if not check.num_prompts:
                yield f"{check.route:8}{0:8}  not compared: {check.note}"
                continue
            changes = f"{check.order_changes} of {check.num_pairs}"
            yield (
                f"{check.route:8}{check.num_prompts:8}{check.largest_difference:11.3g}{check.mean_difference:11.3g}"
                f"{changes:>15}{'yes' if check.constant else 'no':>10}{check.missing_share:9.1%}"
                f"  {'NO' if check.fault else 'yes'}"
            )
        yield from (f"{check.route}: {check.fault}" for check in self.routes if check.fault)
        yield "what is served is what was trained" if self.is_equal else "what is served is NOT what was trained"


def find_samples(model: str, shards: Path | None, num_users: int, domain: str) -> tuple[list[Sample], str]:
    """Users to compare with, and where they come from: the shards given, or those of the run around the model.

    Raises:
        CheckpointError: ``model`` is a pointer to no checkpoint.
        ConfigError: the folder given holds no shards.
    """
    if shards is None:
        folder = follow(Path(model)).resolve()
        return users_to_compare(run_of(folder) or folder.parent, num_users, domain)
    if not (shards / MANIFEST).is_file():
        raise ConfigError(f"--shards {shards}: holds no {MANIFEST}; name a split, such as RUN/shards/test")
    return read_users(shards, num_users), str(shards)


def default_tolerance(local: Local) -> float:
    """By the dtype of the weights on disk, in which servers compute, and of those here."""
    found = local.prompts.found
    folder = local_source(BaseSource(found.base, found.revision, local.prompts.trust_remote_code)).name_or_path
    config = read_json(Path(folder) / CONFIG, finite=False)
    dtypes = (config.get("dtype") or config.get("torch_dtype"), str(next(local.model.parameters()).dtype))
    is_exact = all(str(dtype).endswith("float32") for dtype in dtypes)
    return TOLERANCE if is_exact else TOLERANCE_16_BIT


def verify(
    local: Local, server: ScoreServer, samples: Sequence[Sample], origin: str, routes: Sequence[str], tolerance: float
) -> Verification:
    """Compare a server's scores with those of the model here.

    Args:
        local: the model here.
        server: which.
        samples: users whose prompts are compared, at most ``NUM_CANDIDATES`` candidates each.
        origin: of the samples, for the report.
        routes: of ``ROUTES``.
        tolerance: largest difference of log-odds that is accepted.

    Raises:
        EngineError: the server fails.
    """
    builder = local.prompts.builder
    samples = [replace(sample, candidates=sample.candidates[:NUM_CANDIDATES]) for sample in samples]
    users = list(map(builder.build, samples))
    ours = dict(zip((user.user for user in users), local.score(users), strict=True))
    comparison = Comparison(local, server, texts_of(builder, samples, users), ours, tolerance)
    check = {"tokens": comparison.tokens, "text": comparison.text, "chat": comparison.chat}
    return Verification(server.identity, origin, len(users), tolerance, [check[route](users) for route in routes])


@dataclass(frozen=True, slots=True)
class Comparison:
    """The model here and a server."""

    local: Local
    server: ScoreServer
    texts: Texts
    ours: dict[str, np.ndarray]
    """Log-odds here by user."""
    tolerance: float

    def tokens(self, users: list[TokenizedUser]) -> RouteCheck:
        return self._judge("tokens", users, self._ask([whole(user) for user in users]))

    def text(self, users: list[TokenizedUser]) -> RouteCheck:
        users, texts = self._with_texts(users)
        if not users:
            return RouteCheck("text", 0, note="all prompts were trimmed, so that they are token ids of no text")
        answers, special = self._ask(texts), {"add_special_tokens": self.local.prompts.builder.style == "plain"}
        for row, prompts in zip(answers, texts, strict=True):
            for place, prompt in enumerate(prompts):
                if not row[place].token_ids:
                    ids = self.server.tokenize({"prompt": prompt, **special}) or ()
                    row[place] = replace(row[place], token_ids=ids)
        return self._judge("text", users, answers)

    def chat(self, users: list[TokenizedUser]) -> RouteCheck:
        """What the server makes of messages is scored here, where it is not what the training made of them."""
        if self.local.prompts.builder.style == "plain":
            return RouteCheck("chat", 0, note="the model was trained on plain prompts; send token ids or text")
        users, texts = self._with_texts(users)
        read = [[self._read_message(text) for text in row] for row in texts]
        if not users or any(None in row for row in read):
            return RouteCheck("chat", 0, note="the server has no /tokenize" if users else "all prompts were trimmed")
        is_ours = [list(map(list, row)) for row in read] == list(map(whole, users))
        scores = [self.ours[user.user] for user in users] if is_ours else self.local.score_prompts(read)
        pairs = (zip(map(float, row), ids, strict=True) for row, ids in zip(scores, read, strict=True))
        return self._judge("chat", users, [[Answered(score, token_ids=ids) for score, ids in row] for row in pairs])

    def _with_texts(self, users: list[TokenizedUser]) -> tuple[list[TokenizedUser], list[list[str]]]:
        """Users all of whose prompts are those of a text, and these."""
        texts = [[self.texts.get(tuple(ids)) for ids in whole(user)] for user in users]
        kept = [pair for pair in zip(users, texts, strict=True) if None not in pair[1]]
        return [user for user, _ in kept], [row for _, row in kept]

    def _read_message(self, text: str) -> Ids | None:
        builder = self.local.prompts.builder
        head, tail = builder.encoder.head, builder.encoder.tail
        message = {"role": "user", "content": text[len(head) : len(text) - len(tail)]}
        body: dict[str, Any] = {"messages": [message], "add_generation_prompt": True}
        if builder.chat_template_kwargs:
            body["chat_template_kwargs"] = builder.chat_template_kwargs
        return self.server.tokenize(body)

    def _ask(self, prompts: Sequence[Sequence[Any]]) -> list[list[Answered]]:
        """One prompt a request, so that the number of tokens that the server has read is that prompt's."""
        pool = ThreadPoolExecutor(self.server.settings.max_in_flight)
        try:
            rows = [[pool.submit(self.server.ask, [prompt]) for prompt in row] for row in prompts]
            return [[self.server.wait(future)[0] for future in row] for row in rows]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # of a server that has failed no more is asked

    def _judge(self, route: str, users: list[TokenizedUser], answers: list[list[Answered]]) -> RouteCheck:
        entries = [entry for row in answers for entry in row]
        missing = [entry.problem for entry in entries if entry.problem]
        if missing:
            words, share = f"missing log-probabilities: {missing[0]}", len(missing) / len(entries)
            return RouteCheck(route, len(entries), missing_share=share, fault=words)
        ours = [self.ours[user.user] for user in users]
        theirs: Scores = [np.array([entry.score for entry in row], dtype=np.float32) for row in answers]
        differences = np.abs(np.concatenate(ours) - np.concatenate(theirs))
        pairs = [(u, i, j) for u, row in enumerate(ours) for i, j in combinations(range(len(row)), 2)]
        ordered = [(u, i, j) for u, i, j in pairs if abs(ours[u][i] - ours[u][j]) > TIE]
        changes = sum(bool((ours[u][i] - ours[u][j]) * (theirs[u][i] - theirs[u][j]) <= 0) for u, i, j in ordered)
        fault = ""
        if not differences.max() <= self.tolerance:
            longest = max(entry.num_tokens or len(entry.token_ids) for entry in entries)
            faults = prompt_faults(self.local.prompts.builder, self.texts, longest)
            read = [[entry.token_ids for entry in row] for row in answers]
            fault = diagnose(self.local, users, ours, theirs, read, faults)
        return RouteCheck(
            route,
            len(entries),
            float(differences.max()),
            float(differences.mean()),
            len(ordered),
            changes,
            constant=bool(ordered) and all(np.ptp(row) == 0 for row in theirs),
            fault=fault,
        )
