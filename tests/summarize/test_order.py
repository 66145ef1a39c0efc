"""What the scheduler submits next, when it admits a user, what it counts, and which text it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from trsr_dist.hashing import hash64
from trsr_dist.summarize.cache import TextCache, prompt_hash, text_key
from trsr_dist.summarize.plans.graph import Node, Plan
from trsr_dist.summarize.requests import Completion, Request
from trsr_dist.summarize.scheduler import Counts, Failure, Result, Scheduler, Work

FAULTY = "likes the sea " * 10


class FirstFirst:
    """Answers the requests in the order in which they came, one at each poll, and writes down what happens."""

    def __init__(self, capacity: int = 1, answer: Callable[[Request], Completion] | None = None) -> None:
        self.capacity = capacity
        self.answer = answer or (lambda request: Completion(request.key, f"Likes {request.prompt.items[0]}."))
        self.log: list[Request] = []
        self._in_flight: list[Request] = []

    @property
    def items(self) -> list[str]:
        """First item of each request."""
        return [request.prompt.items[0] for request in self.log]

    def submit(self, request: Request) -> None:
        assert len(self._in_flight) < self.capacity or request.temperature
        self.log.append(request)
        self._in_flight.append(request)

    def poll(self) -> list[Completion]:
        return [self.answer(self._in_flight.pop(0))]

    def close(self) -> None:
        pass


def node(item: int, *parents: int) -> Node:
    return Node("block", "Say what {} readers like.".format, parents, item, item + 1)


def chain(length: int) -> Plan:
    return tuple(node(i, *([i - 1] if i else [])) for i in range(length))


def work(tag: str, plan: Plan) -> Work:
    return Work(tag, plan, [f"{tag}{i}" for i in range(len(plan))])


def run(folder: Path, engine: FirstFirst, works: Iterable[Work], **settings: float) -> tuple[list[Result], Counts]:
    """Results in the order in which they came, and the counts."""
    cache = TextCache(folder, f"start {len(list(folder.glob('*')))}")
    job = Scheduler(engine, {"engine": "first"}, cache, "news", 50, **settings)
    queue = iter(works)
    results = list(job.run(lambda: next(queue, None)))
    assert job.num_users == 0
    return results, job.counts


class TestOrder:
    def test_the_longest_chain_goes_first(self, tmp_path: Path) -> None:
        """Node 1 leads to 2 and 3 to the end, node 0 to the end only."""
        engine = FirstFirst()
        run(tmp_path, engine, [work("a", (node(0), node(1), node(2, 1), node(3, 0, 2)))])
        assert engine.items == ["a1", "a0", "a2", "a3"]

    def test_of_equal_chains_the_earlier_users_and_the_earlier_nodes(self, tmp_path: Path) -> None:
        """Capacity 3: a, b and c begin; then what is left of a goes before that of b."""
        engine = FirstFirst(3)
        run(tmp_path, engine, [work("a", chain(2)), work("b", (node(0), node(1), node(2, 0, 1)))])
        assert engine.items == ["a0", "b0", "b1", "a1", "b2"]

    def test_the_rest_of_an_earlier_user_goes_first(self, tmp_path: Path) -> None:
        engine = FirstFirst(2)
        run(tmp_path, engine, [work("a", chain(2)), work("b", (node(0), node(1), node(2)))])
        assert engine.items == ["a0", "b0", "a1", "b1", "b2"]

    def test_nodes_at_hand_go_before_new_users(self, tmp_path: Path) -> None:
        engine = FirstFirst()
        run(tmp_path, engine, [work("a", (node(0), node(1), node(2))), work("b", chain(1))])
        assert engine.items == ["a0", "a1", "a2", "b0"]

    def test_a_child_waits_for_all_its_parents(self, tmp_path: Path) -> None:
        engine = FirstFirst(2)
        run(tmp_path, engine, [work("a", (node(0), node(1), node(2, 0, 1)))])
        assert [request.prompt.previous for request in engine.log] == [(), (), ("Likes a0.", "Likes a1.")]


class TestAdmission:
    def admitted(self, folder: Path, engine: FirstFirst, works: list[Work]) -> int:
        """How many users are asked for before the first answer."""
        number, before = 0, []

        def next_work() -> Work | None:
            nonlocal number
            number += 1
            return works[number - 1] if number <= len(works) else None

        poll = engine.poll
        engine.poll = lambda: before.append(number) or poll()
        list(Scheduler(engine, {}, TextCache(folder, "t"), "news", 50).run(next_work))
        return before[0]

    @pytest.mark.parametrize("capacity", [1, 3])
    def test_as_many_users_as_there_are_places(self, tmp_path: Path, capacity: int) -> None:
        works = [work(f"u{i}-", chain(3)) for i in range(9)]
        assert self.admitted(tmp_path, FirstFirst(capacity), works) == capacity

    def test_two_a_place_where_they_wait_for_one_prompt(self, tmp_path: Path) -> None:
        works = [Work(i, chain(1), ["same"]) for i in range(20)]
        assert self.admitted(tmp_path, FirstFirst(3), works) == 6

    def test_users_without_nodes_are_handed_out_in_portions(self, tmp_path: Path) -> None:
        asked = 0

        def next_work() -> Work | None:
            nonlocal asked
            asked += 1
            return Work(asked, (), []) if asked <= 10 else None

        job = Scheduler(FirstFirst(4), {}, TextCache(tmp_path, "t"), "news", 50)
        results = [(result, asked) for result in job.run(next_work)]
        assert {(result.records, result.failure) for result, _ in results} == {((), None)}
        seen = [(result.tag, number) for result, number in results]
        assert seen[:4] == [(i, 4) for i in (1, 2, 3, 4)] and seen[4] == (5, 8)
        assert [tag for tag, _ in seen] == list(range(1, 11)) and job.num_users == 0


class TestRecords:
    def test_a_plain_run(self, tmp_path: Path) -> None:
        engine = FirstFirst(
            answer=lambda request: Completion(
                request.key, f" Likes\n{request.prompt.items[0]}. ", prompt_tokens=7, new_tokens=3, words_cut=2
            )
        )
        (result,), counts = run(tmp_path, engine, [work("a", chain(2))])
        assert result.tag == "a" and result.failure is None
        assert [record["text"] for record in result.records] == ["Likes a0.", "Likes a1."]
        first = result.records[0]
        assert first["prompt"] == prompt_hash(engine.log[0].prompt)
        assert first["key"] == engine.log[0].key == text_key({"engine": "first"}, first["prompt"])
        assert engine.log[0].prompt.instruction == "Say what news readers like."
        rest = {name: first[name] for name in first.keys() - {"key", "prompt", "text"}}
        assert rest == {"flags": [], "prompt_tokens": 7, "new_tokens": 3, "words_cut": 2}
        assert counts == Counts(nodes=2, requests=2, prompt_tokens=14, new_tokens=6)

    def test_a_text_of_the_cache_costs_no_request(self, tmp_path: Path) -> None:
        works = [work("a", chain(2))]
        before, _ = run(tmp_path, FirstFirst(), works)
        engine = FirstFirst()
        after, counts = run(tmp_path, engine, works)
        assert after == before and engine.log == [] and "words_cut" not in after[0].records[0]
        assert counts == Counts(nodes=2, cache_hits=2)

    def test_users_with_equal_prompts_share_one_request(self, tmp_path: Path) -> None:
        works = [Work(tag, chain(1), ["same"]) for tag in "ab"]
        results, counts = run(tmp_path, FirstFirst(2), works)
        assert [result.tag for result in results] == ["a", "b"] and results[0].records == results[1].records
        assert counts == Counts(nodes=2, requests=1)

    def test_requests_say_how_to_sample(self, tmp_path: Path) -> None:
        engine = FirstFirst()
        run(tmp_path / "cold", engine, [work("a", chain(2))], temperature=0.3, seed=5)
        for request in engine.log:
            assert (request.max_new_tokens, request.temperature) == (50, 0.3)
            assert request.seed == hash64(5, request.key) // 2 < 2**63
        again = FirstFirst()
        run(tmp_path / "other", again, [work("a", chain(2))], seed=6)
        assert [request.temperature for request in again.log] == [0.0, 0.0]
        assert again.log[0].seed != engine.log[0].seed
        plain = FirstFirst()
        run(tmp_path / "plain", plain, [work("a", chain(1))])
        assert plain.log[0].seed == hash64(0, plain.log[0].key) // 2


def answers(first: Completion, second: Completion) -> Callable[[Request], Completion]:
    """The second one where the request is a retry (sampled at another temperature than 0)."""
    fields = ("text", "cut", "prompt_tokens", "new_tokens", "error")

    def answer(request: Request) -> Completion:
        chosen = second if request.temperature else first
        return Completion(request.key, **{name: getattr(chosen, name) for name in fields})

    return answer


class TestRetries:
    def run(self, folder: Path, first: Completion, second: Completion) -> tuple[Result, Counts, list[Request]]:
        engine = FirstFirst(answer=answers(first, second))
        (result,), counts = run(folder, engine, [work("a", chain(1))])
        return result, counts, engine.log

    def test_a_better_text_is_kept_and_nothing_is_counted_against_it(self, tmp_path: Path) -> None:
        first, second = Completion("", FAULTY, new_tokens=30), Completion("", "Likes tea.", new_tokens=3)
        result, counts, log = self.run(tmp_path, first, second)
        assert result.records[0]["text"] == "Likes tea." and result.records[0]["sampled"] is True
        assert result.records[0]["prompt"] == prompt_hash(log[0].prompt)
        assert counts == Counts(nodes=1, requests=1, retries=1, new_tokens=33)
        assert (log[1].temperature, log[1].seed) == (0.7, hash64("retry", log[0].key) // 2)
        assert (log[1].key, log[1].prompt, log[1].max_new_tokens) == (log[0].key, log[0].prompt, 50)

    def test_of_equally_bad_texts_the_first_is_kept(self, tmp_path: Path) -> None:
        result, counts, log = self.run(tmp_path, Completion("", FAULTY), Completion("", "Likes tea and", cut=True))
        assert result.records[0]["text"] == FAULTY.strip() and "sampled" not in result.records[0]
        assert counts == Counts(nodes=1, requests=1, retries=1, flags={"repetition": 1}) and len(log) == 2

    def test_a_worse_second_text_is_dropped(self, tmp_path: Path) -> None:
        result, counts, _ = self.run(tmp_path, Completion("", FAULTY), Completion("", FAULTY, cut=True))
        assert result.records[0]["flags"] == ["repetition"] and counts.flags == {"repetition": 1}

    def test_a_text_that_runs_on_is_cut_and_flagged(self, tmp_path: Path) -> None:
        result, counts, _ = self.run(tmp_path, *[Completion("", "Likes tea.\nUser: And coffee?")] * 2)
        assert (result.records[0]["text"], counts.flags) == ("Likes tea.", {"run_on": 1})

    def test_a_text_that_was_not_generated_stays_whole(self, tmp_path: Path) -> None:
        """What an extractive engine takes from the items may look like a turn."""
        text = "Likes tea.\nUser: And coffee?"
        engine = FirstFirst(answer=lambda request: Completion(request.key, text, generated=False))
        (result,), counts = run(tmp_path, engine, [work("a", chain(1))])
        assert (result.records[0]["text"], counts.flags) == ("Likes tea. User: And coffee?", {})
        assert counts.retries == 0

    def test_flags_are_counted_over_texts(self, tmp_path: Path) -> None:
        engine = FirstFirst(answer=answers(*[Completion("", FAULTY, cut=True)] * 2))
        _, counts = run(tmp_path, engine, [work("a", chain(2))])
        assert counts.flags == {"repetition": 2, "cut": 2} and counts.retries == 2

    def test_a_text_that_was_sampled_is_sampled_at_its_own_temperature(self, tmp_path: Path) -> None:
        engine = FirstFirst(answer=answers(Completion(""), Completion("", FAULTY)))
        run(tmp_path, engine, [work("a", chain(1))], temperature=0.3)
        assert [request.temperature for request in engine.log] == [0.3, 0.3]
        assert engine.log[0].seed != engine.log[1].seed

    def test_an_empty_text_fails_its_user(self, tmp_path: Path) -> None:
        result, counts, log = self.run(tmp_path, Completion("", " .", cut=True), Completion("", ""))
        reason = "the engine wrote no text, and none when sampled"
        assert result == Result("a", (), Failure(0, log[0].key, reason))
        assert counts == Counts(failures=1, requests=1, retries=1)
        result, _, _ = self.run(tmp_path, *[Completion("", "", cut=True)] * 2)
        assert result.failure.reason == (
            f"{reason}: its thoughts took all of summarize.max_new_tokens=50; raise that, or turn thoughts off with "
            "summarize.chat_template_kwargs"
        )

    def test_any_text_is_better_than_none(self, tmp_path: Path) -> None:
        result, _, _ = self.run(tmp_path, Completion("", ""), Completion("", FAULTY, cut=True))
        assert result.failure is None and result.records[0]["text"] == FAULTY.strip()

    def test_an_empty_text_is_not_kept(self, tmp_path: Path) -> None:
        self.run(tmp_path, Completion("", ""), Completion("", ""))
        result, _, log = self.run(tmp_path, Completion("", "Likes tea."), Completion("", ""))
        assert result.failure is None and len(log) == 1

    def test_a_failed_retry_leaves_the_first_text(self, tmp_path: Path) -> None:
        result, counts, _ = self.run(tmp_path, Completion("", FAULTY, cut=True), Completion("", error="gone"))
        assert result.records[0]["flags"] == ["repetition", "cut"]
        assert counts == Counts(nodes=1, requests=1, retries=1, flags={"repetition": 1, "cut": 1})


class TestFailures:
    def test_a_failure_ends_one_user_and_is_counted_once(self, tmp_path: Path) -> None:
        """Both blocks of user a fail; its merge is never asked for."""

        def answer(request: Request) -> Completion:
            item = request.prompt.items[0]
            return (
                Completion(request.key, error="refused")
                if item[0] == "a"
                else Completion(request.key, f"Likes {item}.")
            )

        engine = FirstFirst(2, answer)
        results, counts = run(tmp_path, engine, [work("a", (node(0), node(1), node(2, 0, 1))), work("b", chain(2))])
        assert {result.tag: result.failure for result in results} == {
            "a": Failure(0, engine.log[0].key, "refused"),
            "b": None,
        }
        assert counts == Counts(nodes=2, requests=4, failures=1)
        assert engine.items == ["a0", "a1", "b0", "b1"]

    def test_what_a_failed_user_had_ready_is_not_submitted(self, tmp_path: Path) -> None:
        def answer(request: Request) -> Completion:
            return Completion(request.key, error="refused")

        engine = FirstFirst(1, answer)
        (result,), counts = run(tmp_path, engine, [work("a", (node(0), node(1), node(2)))])
        assert engine.items == ["a0"] and result.failure.node == 0 and counts.failures == 1

    def test_a_late_text_of_a_failed_user_gives_no_second_result(self, tmp_path: Path) -> None:
        def answer(request: Request) -> Completion:
            item = request.prompt.items[0]
            return Completion(request.key, error="no") if item == "a0" else Completion(request.key, f"Likes {item}.")

        results, counts = run(tmp_path, FirstFirst(2, answer), [work("a", (node(0), node(1)))])
        assert [(result.tag, result.records) for result in results] == [("a", ())]
        assert counts == Counts(nodes=1, requests=2, failures=1)

    def test_all_who_wait_for_a_failed_prompt_fail(self, tmp_path: Path) -> None:
        engine = FirstFirst(2, lambda request: Completion(request.key, error="no", prompt_tokens=4))
        results, counts = run(tmp_path, engine, [Work(tag, chain(1), ["same"]) for tag in "ab"])
        assert [result.tag for result in results] == ["a", "b"] and all(result.failure for result in results)
        assert counts == Counts(requests=1, failures=2, prompt_tokens=4)
