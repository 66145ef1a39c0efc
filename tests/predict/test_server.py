"""Rankings through a server are those of the model in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.predict.world import Served, load, make_folder
from tests.spawn import run_script
from tests.summarize.server import Handler, Server, serving
from tests.tokenizers import sentencepiece
from trsr_dist.errors import ConfigError, EngineError
from trsr_dist.predict import Ranker, Request
from trsr_dist.predict.server import PROMPTS_PER_REQUEST, ServerSettings

TOPICS = ("tea", "cups", "tennis", "markets", "rain", "stocks", "a quiet final", "jazz")
REQUESTS = [
    Request(
        tuple(f"title: {topic} {number}" for topic in TOPICS[: 3 + number]),
        tuple(f"title: {topic}" for topic in TOPICS[number : number + 3]),
        name=f"u{number}",
    )
    for number in range(5)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def local(folder: Path) -> Ranker:
    return Ranker.open(str(folder), device="cpu")


@pytest.fixture(scope="module")
def served(folder: Path, local: Ranker) -> Served:
    return Served(load(folder), sentencepiece(), local.builder.answer_ids)


@contextmanager
def connected(folder: Path, served: Any, **settings: Any) -> Iterator[tuple[Ranker, Server]]:
    with serving(served) as server:
        options = {"max_retries": 2, "timeout_seconds": 60} | settings
        yield Ranker.connect(ServerSettings(server.address, **options), str(folder)), server


def scores(ranker: Ranker, requests: list[Request] = REQUESTS) -> dict[tuple[str, int], float]:
    rankings = zip(requests, ranker.rank_many(requests), strict=True)
    return {(request.name, entry.index): entry.score for request, ranking in rankings for entry in ranking.candidates}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classifies": True},
        {"knows_ids": False},  # both answers among the most probable tokens, or echoed
        {"knows_ids": False, "max_logprobs": 1},
        {"knows_ids": False, "max_logprobs": 1000, "names_ids": False},  # "yes" is the text of two tokens: echoed
        {"refuses": ("logprob_token_ids", "return_token_ids"), "names_ids": False},
    ],
    ids=["ids", "classifier", "top", "echo", "texts", "refusals"],
)
def test_scores_are_those_of_this_process(folder: Path, local: Ranker, served: Served, changes: dict) -> None:
    with connected(folder, replace(served, **changes), top_logprobs=1000) as (ranker, server):
        assert scores(ranker) == pytest.approx(scores(local), abs=1e-5)
        assert ranker.server.protocol == ("classify" if "classifies" in changes else "completions")
        sent = [body.get("prompt", body.get("input")) for _, body, _ in server.requests]
        assert not any(isinstance(prompt, str) for prompt in sent), "token ids"


def test_an_answer_that_the_server_does_not_tell_is_named(folder: Path, served: Served) -> None:
    silent = replace(served, knows_ids=False, max_logprobs=1, echoes=False)
    with connected(folder, silent) as (ranker, _), pytest.raises(EngineError) as caught:
        ranker.rank(REQUESTS[0])
    words = str(caught.value)
    assert "request 'u0', candidates[0]: no log-probability of 'yes' (token" in words or "'no' (token" in words
    assert f"--max-logprobs {len(sentencepiece())}" in words


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_fails_is_not_taken_for_one_that_echoes_nothing(
    folder: Path, served: Served, status: int
) -> None:
    def failing(handler: Handler, body: dict, tries: int) -> None:
        if body.get("echo"):
            handler.reply({"error": {"message": "out of memory"}}, status)
        else:
            replace(served, knows_ids=False, max_logprobs=1)(handler, body, tries)

    expected = "no log-probability of" if status == 400 else "out of memory"
    with connected(folder, failing, max_retries=0) as (ranker, _), pytest.raises(EngineError, match=expected):
        ranker.rank(REQUESTS[0])


def test_a_prefix_is_sent_ahead_and_requests_are_bounded(folder: Path, local: Ranker, served: Served) -> None:
    """The first candidate is answered before the others are sent; never more than two requests at a time."""
    running, most, guard = 0, 0, threading.Lock()
    finished: list[list[int]] = []

    def slow(handler: Handler, body: dict, tries: int) -> None:
        nonlocal running, most
        with guard:
            running, seen = running + 1, list(finished)
            most = max(most, running)
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        if len(prompts) > 1:
            assert any(prompt[:60] == prompts[0][:60] for prompt in seen), "the prefix is there already"
        time.sleep(0.02)
        with guard:
            running -= 1
            finished.extend(prompts)
        served(handler, body, tries)

    many = replace(REQUESTS[0], candidates=tuple(f"title: number {n}" for n in range(2 * PROMPTS_PER_REQUEST + 5)))
    asked = [*REQUESTS, many]
    with connected(folder, slow, max_in_flight=2) as (ranker, server):
        assert scores(ranker, asked) == pytest.approx(scores(local, asked), abs=1e-5)
        sizes = [len(body["prompt"]) if isinstance(body["prompt"][0], list) else 1 for _, body, _ in server.requests]
    assert most == 2
    assert max(sizes) == PROMPTS_PER_REQUEST and sum(sizes) - 1 == sum(len(request.candidates) for request in asked)


def test_replies_with_many_log_probabilities_stay_short(folder: Path, local: Ranker, served: Served) -> None:
    """What the error about a missing answer advises: the whole vocabulary, megabytes a prompt."""
    sizes = []

    def watched(handler: Handler, body: dict, tries: int) -> None:
        sizes.append(len(body["prompt"]) if isinstance(body["prompt"][0], list) else 1)
        replace(served, knows_ids=False, max_logprobs=128_000)(handler, body, tries)

    request = Request(tuple(f"title: {topic} {n}" for topic in TOPICS for n in range(2)), ("title: tea",), name="u")
    with connected(folder, watched, top_logprobs=128_000) as (ranker, _):
        assert scores(ranker, [request]) == pytest.approx(scores(local, [request]), abs=1e-5)
    assert max(sizes) == 2


def test_faults_that_pass_are_tried_again(folder: Path, local: Ranker, served: Served) -> None:
    def shaky(handler: Handler, body: dict, tries: int) -> None:
        if tries == 1 and body.get("logprobs"):
            handler.reply({"error": "busy"}, 503, {"Retry-After": "0"})
        elif tries == 2 and body.get("logprobs"):
            handler.reply({"choices": []})
        else:
            served(handler, body, tries)

    with connected(folder, shaky) as (ranker, _):
        assert scores(ranker) == pytest.approx(scores(local), abs=1e-5)


def test_servers_and_models_that_are_not_there_are_named(folder: Path, served: Served) -> None:
    two = replace(served, models=[{"id": "base"}, {"id": "ours", "parent": "base"}])
    with serving(two) as server:
        for name, words in (("", "lists 2 models \\(base, ours\\)"), ("other", "has no model 'other'")):
            with pytest.raises(ConfigError, match=f"{words}.*--served-model"):
                Ranker.connect(ServerSettings(server.address, name), str(folder))
        ranker = Ranker.connect(ServerSettings(server.address.removesuffix("/v1"), "ours"), str(folder))
        assert {body["model"] for _, body, _ in server.requests} == {"ours"}
        assert ranker.server.identity["parent"] == "base"
    with pytest.raises(EngineError, match="check --server, and that the server runs"):
        Ranker.connect(ServerSettings(server.address, max_retries=0), str(folder))
    with pytest.raises(ConfigError, match="--server is no address"):
        Ranker.connect("localhost:8000", str(folder))

    def neither(handler: Handler, body: dict, tries: int) -> None:
        handler.reply({"detail": "Not Found"}, 404)

    with serving(neither) as server, pytest.raises(EngineError, match="/v1/completions: .*/classify: .*404"):
        Ranker.connect(server.address, str(folder))


def test_a_classifier_of_two_labels_is_refused(folder: Path, served: Served) -> None:
    def two_labels(handler: Handler, body: dict, tries: int) -> None:
        handler.reply({"data": [{"index": 0, "probs": [0.1, 0.9]}]})

    asked = connected(folder, two_labels, protocol="classify")
    with asked as (ranker, _), pytest.raises(EngineError, match="2 labels, expected one"):
        ranker.rank(REQUESTS[0])


def test_the_command_gives_the_lines_of_this_process_and_goes_on_after_a_failure(
    folder: Path, served: Served, tmp_path: Path
) -> None:
    source, here, there = (tmp_path / name for name in ("in.jsonl", "here.jsonl", "there.jsonl"))
    lines = [{"id": r.name, "items": list(r.items), "candidates": list(r.candidates)} for r in REQUESTS * 30]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("--model", folder, "--input", source)
    done = run_script("tools/predict.py", *common, "--output", here, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    broken, prompts = True, []

    def answer(handler: Handler, body: dict, tries: int) -> None:
        if broken and len(prompts) > 200:
            handler.reply({"error": {"message": "the disk is full"}}, 500)
            return
        prompts.extend(body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]])
        served(handler, body, tries)

    with serving(answer) as server:
        options = ("--output", there, "--server", server.address, "--max-retries", 1, "--max-in-flight", 1)
        done = run_script("tools/predict.py", *common, *options)
        assert done.returncode == 1 and "the disk is full" in done.stderr and not there.exists()
        broken, first = False, len(prompts)
        done = run_script("tools/predict.py", *common, *options)
        assert done.returncode == 0, done.stderr
    assert "going on behind the" in done.stdout
    total = sum(len(line["candidates"]) for line in lines)
    assert len(prompts) - first < total, "what was ranked is not asked for again"
    expected, found = ([json.loads(line) for line in path.read_text().splitlines()] for path in (here, there))
    assert len(found) == len(lines)
    for one, other in zip(expected, found, strict=True):
        assert {e["index"]: e["score"] for e in other["ranked"]} == pytest.approx(
            {e["index"]: e["score"] for e in one["ranked"]}, abs=1e-5
        )
        assert {key: value for key, value in one.items() if key != "ranked"} == {
            key: value for key, value in other.items() if key != "ranked"
        }
    assert not list(tmp_path.glob(".*partial*"))
