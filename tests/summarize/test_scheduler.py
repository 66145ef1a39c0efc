"""The scheduler on an engine whose answers come late, in any order, and sometimes wrong."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.cache import TextCache
from trsr_dist.summarize.extract import ExtractiveEngine, extract
from trsr_dist.summarize.plans.graph import hierarchical, recurrent
from trsr_dist.summarize.requests import Completion, Request
from trsr_dist.summarize.scheduler import Result, Scheduler, Work


class LateEngine:
    """Answers a random one of the requests in flight at each poll."""

    def __init__(self, capacity: int, answer: Callable[[Request], Completion] | None = None) -> None:
        self.capacity = capacity
        self.answer = answer or (lambda request: Completion(request.key, echo(request.prompt)))
        self.in_flight: list[Request] = []
        self.log: list[Request] = []
        self.fullness: list[int] = []
        self._random = random.Random(0)

    def submit(self, request: Request) -> None:
        self.in_flight.append(request)
        self.log.append(request)
        assert len(self.in_flight) <= self.capacity

    def poll(self) -> list[Completion]:
        self.fullness.append(len(self.in_flight))
        return [self.answer(self.in_flight.pop(self._random.randrange(len(self.in_flight))))]

    def close(self) -> None:
        pass


def echo(prompt: SummaryPrompt) -> str:
    return "(" + " ".join((*prompt.previous, *prompt.items)) + ")"


def users(number: int, plan: Callable = hierarchical) -> Callable[[], Work | None]:
    rows = iter(range(number))

    def next_work() -> Work | None:
        user = next(rows, None)
        if user is None:
            return None
        items = [f"u{user}i{i}" for i in range(1 + user * 7 % 40)]
        return Work(user, plan(len(items), 5, 3), items)

    return next_work


def scheduler(engine: LateEngine, folder: Path, task: str = "t") -> Scheduler:
    return Scheduler(engine, {"engine": "late"}, TextCache(folder, task), "news", 50)


def run(engine: LateEngine, folder: Path, source: Callable[[], Work | None], task: str = "t") -> dict[int, Result]:
    results = list(scheduler(engine, folder, task).run(source))
    assert len({result.tag for result in results}) == len(results)
    return {result.tag: result for result in results}


@pytest.mark.parametrize("plan", [hierarchical, recurrent])
@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_the_texts_do_not_depend_on_the_order_of_completions(tmp_path: Path, plan: Callable, capacity: int) -> None:
    alone = run(LateEngine(1), tmp_path / "alone", users(40, plan))
    many = run(LateEngine(capacity), tmp_path / "many", users(40, plan))
    assert {tag: result.records for tag, result in many.items()} == {tag: r.records for tag, r in alone.items()}
    assert len(many) == 40


def test_the_engine_is_kept_full_until_the_work_runs_out(tmp_path: Path) -> None:
    engine = LateEngine(16)
    run(engine, tmp_path, users(200, recurrent))
    early = engine.fullness[: len(engine.fullness) * 9 // 10]
    assert min(early) == 16


def test_users_are_admitted_only_as_room_appears(tmp_path: Path) -> None:
    engine, admitted, finished = LateEngine(4), 0, 0
    source = users(100)

    def counting() -> Work | None:
        nonlocal admitted
        work = source()
        admitted += work is not None
        return work

    for _ in scheduler(engine, tmp_path).run(counting):
        finished += 1
        assert admitted - finished <= 16
    assert finished == 100


def test_only_new_blocks_are_generated_when_a_user_gains_items(tmp_path: Path) -> None:
    def grown(length: int, plan: Callable) -> Callable[[], Work | None]:
        items = [f"item {i}" for i in range(length)]
        works = iter([Work("u", plan(length, 5, 8), items)])
        return lambda: next(works, None)

    for plan, expected in ((recurrent, 2), (hierarchical, 3)):
        run(LateEngine(4), tmp_path / str(expected), grown(20, plan), "a")
        engine = LateEngine(4)
        run(engine, tmp_path / str(expected), grown(30, plan), "b")
        assert len(engine.log) == expected


def test_the_failure_told_does_not_depend_on_the_order_of_completions(tmp_path: Path) -> None:
    def answer(request: Request) -> Completion:
        block = next(iter(request.prompt.items), "")
        refused = block.startswith("u4i") and block not in ("u4i0", "u4i5")
        return Completion(request.key, error=f"refused {block}") if refused else Completion(request.key, "text")

    for capacity in (1, 7, 64):
        results = run(LateEngine(capacity, answer), tmp_path / str(capacity), users(10))
        assert results[4].failure.node == 2 and results[4].failure.reason == "refused u4i10"
        assert [tag for tag, result in results.items() if result.failure] == [4]


def test_a_text_that_only_meets_the_limit_is_asked_for_once(tmp_path: Path) -> None:
    works = iter([Work("u", hierarchical(1, 5, 3), ["a"])])
    engine = LateEngine(4, lambda request: Completion(request.key, "Likes tennis and", cut=True))
    job = scheduler(engine, tmp_path)
    (result,) = job.run(lambda: next(works, None))
    assert result.records[0]["text"] == "Likes tennis and" and result.records[0]["flags"] == ["cut"]
    assert (job.counts.flags, job.counts.retries, len(engine.log)) == ({"cut": 1}, 0, 1)


def test_faults_are_counted_and_the_better_of_two_texts_is_kept(tmp_path: Path) -> None:
    def answer(request: Request) -> Completion:
        text = "the user likes " * 10 if request.temperature == 0 else "Likes tennis and"
        return Completion(request.key, text, cut=True, prompt_tokens=5, new_tokens=7)

    works = iter([Work("u", hierarchical(1, 5, 3), ["a"])])
    job = scheduler(LateEngine(4, answer), tmp_path)
    (result,) = job.run(lambda: next(works, None))
    assert result.records[0]["flags"] == ["cut"] and result.records[0]["sampled"]
    assert (job.counts.flags, job.counts.retries, job.counts.requests) == ({"cut": 1}, 1, 1)
    assert (job.counts.prompt_tokens, job.counts.new_tokens) == (10, 14)


def test_an_extractive_summary_is_not_cut_at_items_that_look_like_a_turn(tmp_path: Path) -> None:
    items = ["topic: [Items] of tea", "topic: [Candidate] </think> cups", "topic: Summary: rain"]
    works = iter([Work("u", hierarchical(3, 5, 8), items)])
    (result,) = run(ExtractiveEngine(4), tmp_path, lambda: next(works, None)).values()
    record = result.records[-1]
    assert record["text"] == extract(SummaryPrompt("", (), tuple(items)), 50)
    assert all(words in record["text"] for words in ("[Items] of tea", "[Candidate] </think> cups", "Summary: rain"))
    assert record["flags"] == []
