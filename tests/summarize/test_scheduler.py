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


def test_a_second_run_makes_no_call(tmp_path: Path) -> None:
    first = run(LateEngine(8), tmp_path, users(30))
    engine = LateEngine(8)
    second = run(engine, tmp_path, users(30), "second")
    assert engine.log == []
    assert second == first


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


def test_equal_prompts_are_generated_once(tmp_path: Path) -> None:
    works = iter([Work(user, hierarchical(10, 5, 3), [f"i{i}" for i in range(10)]) for user in range(5)])
    engine = LateEngine(32)
    results = run(engine, tmp_path, lambda: next(works, None))
    assert len(engine.log) == 3 and len(results) == 5


def test_one_users_failure_is_that_users_alone(tmp_path: Path) -> None:
    def answer(request: Request) -> Completion:
        if "u3i0 " in request.prompt.text().replace("\n", " "):
            return Completion(request.key, error="refused")
        return Completion(request.key, echo(request.prompt))

    results = run(LateEngine(8, answer), tmp_path, users(10))
    assert {tag for tag, result in results.items() if result.failure} == {3}
    assert "refused" in results[3].failure.reason


def test_the_failure_told_does_not_depend_on_the_order_of_completions(tmp_path: Path) -> None:
    def answer(request: Request) -> Completion:
        block = next(iter(request.prompt.items), "")
        refused = block.startswith("u4i") and block not in ("u4i0", "u4i5")
        return Completion(request.key, error=f"refused {block}") if refused else Completion(request.key, "text")

    for capacity in (1, 7, 64):
        results = run(LateEngine(capacity, answer), tmp_path / str(capacity), users(10))
        assert results[4].failure.node == 2 and results[4].failure.reason == "refused u4i10"
        assert [tag for tag, result in results.items() if result.failure] == [4]


def test_a_faulty_text_is_tried_once_more_with_sampling(tmp_path: Path) -> None:
    def answer(request: Request) -> Completion:
        return Completion(request.key, "Likes tennis." if request.temperature else "", new_tokens=1)

    engine = LateEngine(4, answer)
    works = iter([Work("u", hierarchical(5, 5, 3), list("abcde"))])
    (result,) = run(engine, tmp_path, lambda: next(works, None)).values()
    assert [request.temperature > 0 for request in engine.log] == [False, True]
    assert engine.log[1].seed != engine.log[0].seed
    assert result.records[0]["text"] == "Likes tennis." and result.records[0]["sampled"]


def test_a_fault_that_stays_is_flagged_and_an_empty_text_fails(tmp_path: Path) -> None:
    texts = {"a": "", "b": "the user likes " * 10, "c": "<think>So, the user"}

    def answer(request: Request) -> Completion:
        (item,) = request.prompt.items
        return Completion(request.key, texts[item], cut=item == "c")

    works = iter([Work(name, hierarchical(1, 5, 3), [name]) for name in "abc"])
    engine = LateEngine(4, answer)
    results = run(engine, tmp_path, lambda: next(works, None))
    assert "no text" in results["a"].failure.reason and "thoughts" not in results["a"].failure.reason
    assert "thoughts took all of summarize.max_new_tokens=50" in results["c"].failure.reason
    assert results["b"].records[0]["flags"] == ["repetition"]
    assert len(engine.log) == 6


def test_a_plan_without_nodes_needs_no_engine(tmp_path: Path) -> None:
    works = (Work(number, (), ["a"]) for number in range(1000))
    engine = LateEngine(4)
    results = run(engine, tmp_path, lambda: next(works, None))
    assert len(results) == 1000 and engine.log == []


def test_users_who_wait_for_one_prompt_are_not_admitted_without_end(tmp_path: Path) -> None:
    works = (Work(user, hierarchical(3, 5, 3), ["a", "b", "c"]) for user in range(1000))
    admitted = 0

    def counting() -> Work | None:
        nonlocal admitted
        admitted += 1
        return next(works, None)

    results = scheduler(LateEngine(4), tmp_path).run(counting)
    next(results)
    assert admitted <= 16
    assert sum(1 for _ in results) == 999


def test_a_retry_that_fails_leaves_the_first_text(tmp_path: Path) -> None:
    def answer(request: Request) -> Completion:
        if request.temperature:
            return Completion(request.key, error="out of memory")
        return Completion(request.key, "the user likes " * 10)

    works = iter([Work("u", hierarchical(1, 5, 3), ["a"])])
    (result,) = run(LateEngine(4, answer), tmp_path, lambda: next(works, None)).values()
    assert result.records[0]["flags"] == ["repetition"] and "sampled" not in result.records[0]


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
