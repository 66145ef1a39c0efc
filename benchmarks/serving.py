"""Ranking in this process and through vLLM, on the same prompts and one thread each, in items a second.

Half of a user's candidates are measured. Where prefixes are kept, the other half was ranked before. vLLM caches
prefixes in all its ways; its cache is emptied before those that begin cold.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Row, rate_row, timed
from benchmarks.vllm import Vllm, vllm_server
from benchmarks.ways import REPEATS
from trsr_dist.predict import Ranker, Request
from trsr_dist.predict.verify import find_samples

NUM_USERS = 8
COLD, KEPT = "in process, cold", "in process, prefixes kept"
VLLM_COLD, VLLM_KEPT, SINGLY = "over vLLM, cold", "over vLLM, prefixes cached", "vLLM, one prompt at a time"
Scores = dict[tuple[str, int], float]
"""Log-odds by user and place among the candidates."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to rank requests."""

    name: str
    prepare: Callable[[], object]
    """Not measured."""
    rank: Callable[[list[Request]], Scores]


def run(scale: float, model: str = "", vllm: str = "") -> list[Row]:
    """All measurements.

    Args:
        scale: multiplies the number of users; below 1 there is a repetition less.
        model: merged folder; users are those of its run's test split.
        vllm: vLLM's command.
    """
    if not model:
        return [_not_run(COLD, "name a merged folder with --model")]
    torch.set_num_threads(1)
    plain, keeping = (Ranker.open(model, "cpu", "float32", prefix_cache_mb=size) for size in (0, 4096))
    samples, origin = find_samples(model, None, max(1, round(NUM_USERS * scale)), plain.domain)
    halves = [[], []]
    for sample in samples:
        texts = [candidate.text for candidate in sample.candidates]
        for half in (0, 1):
            halves[half].append(Request(tuple(texts[half::2]), sample.recent, sample.summary, sample.user))
    earlier, asked = halves
    ways = [
        Way(COLD, list, partial(ranked, plain)),
        Way(KEPT, lambda: ranked(keeping, earlier), partial(ranked, keeping)),
    ]
    with ExitStack() as stack:
        server = None
        if vllm:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
            server = stack.enter_context(vllm_server(Path(vllm), Path(model), log))
            ways += ways_of(server, Ranker.connect(server.address, model), earlier)
        case = f"{len(samples)} users of {Path(origin).name}"
        rows = list(compare(ways, asked, REPEATS if scale >= 1 else REPEATS - 1, case, server))
    return rows if vllm else [*rows, _not_run(VLLM_COLD, "name vLLM's command with --vllm")]


def ways_of(server: Vllm, ranker: Ranker, earlier: list[Request]) -> list[Way]:
    """Through a server."""

    def rank_earlier() -> None:
        server.forget()
        ranked(ranker, earlier)

    def singly(requests: list[Request]) -> Scores:
        found = {}
        for request in requests:
            user = ranker.builder.build(ranker.sample(request))
            for place, suffix in enumerate(user.suffixes):
                found[user.user, place] = ranker.server.ask([[*user.prefix, *suffix]])[0].score
        return found

    return [
        Way(VLLM_COLD, server.forget, partial(ranked, ranker)),
        Way(VLLM_KEPT, rank_earlier, partial(ranked, ranker)),
        Way(SINGLY, server.forget, singly),
    ]


def compare(ways: list[Way], asked: list[Request], repeats: int, case: str, server: Vllm | None) -> Iterator[Row]:
    """The ways in turn, after a request of each that is not counted."""
    wall: dict[str, list[float]] = {way.name: [] for way in ways}
    cpu: dict[str, list[float]] = {way.name: [] for way in ways}
    scores: dict[str, Scores] = {}
    for way in ways:
        way.rank(asked[:1])
    for way in ways * repeats:
        way.prepare()
        before = server.cpu_seconds() if server else 0.0
        with timed() as timer:
            scores[way.name] = way.rank(asked)
        wall[way.name].append(timer.wall)
        cpu[way.name].append(timer.cpu + (server.cpu_seconds() - before if server else 0.0))
    num_items = len(scores[COLD])
    for unit, seconds in (("items/s", wall), ("items/CPU-s", cpu)):
        yield from (rate_row("serving", case, way.name, num_items, seconds[way.name], unit) for way in ways)
    expected = scores[COLD]
    for way in ways[1:]:
        difference = max(abs(scores[way.name][key] - expected[key]) for key in expected)
        yield Row("serving", case, f"{way.name}: largest difference", difference, "log-odds")


def ranked(ranker: Ranker, requests: list[Request]) -> Scores:
    """All requests in one call."""
    rankings = zip(requests, ranker.rank_many(requests), strict=True)
    return {(request.name, entry.index): entry.score for request, found in rankings for entry in found.candidates}


def _not_run(name: str, remedy: str) -> Row:
    return Row("serving", name, "items a second", math.nan, "items/s", f"not run: {remedy}")
