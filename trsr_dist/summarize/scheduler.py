"""Runs plans of many users on one engine: a node is submitted the moment its parents are done.

No waves and no barriers between users or levels. Users are admitted only when the engine has room, so memory does not
grow with their number; the longest remaining chain goes first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trsr_dist.hashing import hash64
from trsr_dist.prompts.text import one_line
from trsr_dist.summarize.cache import TextCache, prompt_hash, text_key
from trsr_dist.summarize.plans.graph import Plan, children, heights, node_prompt
from trsr_dist.summarize.quality import clean, flags_of
from trsr_dist.summarize.requests import Completion, Engine, Request

RETRY_TEMPERATURE = 0.7
USERS_PER_PLACE = 2
"""Users at work for each place of the engine: more than one, since some wait for a prompt that another one shares."""


@dataclass(frozen=True, slots=True)
class Work:
    """One user's plan."""

    tag: Any
    """Comes back with the result."""
    plan: Plan
    items: Sequence[str]
    """Texts of the history, oldest first."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that has failed for good."""

    node: int
    """Position in the user's plan."""
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """A user's finished plan."""

    tag: Any
    records: tuple[dict[str, Any], ...]
    """One a node: key, prompt hash, text, flags, counts. Empty where the plan is empty or has failed."""
    failure: Failure | None = None
    """The first node in the plan that failed, if one did."""


@dataclass(slots=True)
class Counts:
    """What a scheduler has done; read by the status."""

    nodes: int = 0
    cache_hits: int = 0
    requests: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    flags: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _User:
    work: Work
    records: list[dict[str, Any] | None]
    height: list[int]
    children: list[list[int]]
    order: int
    left: int
    """Nodes that still can be written."""
    failure: Failure | None = None
    """The failed node that stands first in the plan."""
    lost: set[int] = field(default_factory=set)
    """Nodes that failed or were given up, and all that build on them."""


@dataclass(slots=True)
class _Pending:
    """A request in flight and the nodes that wait for it."""

    request: Request
    prompt: str
    """Hash of the prompt."""
    waiting: list[tuple[_User, int]]
    first: dict[str, Any] | None = None
    """The record of the first try, while the second one runs."""


class Scheduler:
    """Keeps an engine full.

    Args:
        engine: does the work.
        identity: all that a text depends on beside the prompt; part of every key.
        cache: asked first; every new text is kept there.
        domain: wording of the prompts.
        max_new_tokens: length limit of a text.
        temperature: of the first try; 0 is greedy.
        seed: of the sampling.
    """

    def __init__(
        self,
        engine: Engine,
        identity: dict[str, Any],
        cache: TextCache,
        domain: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.cache = cache
        self.domain = domain
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.identity = identity
        self.counts = Counts()
        self._ready: list[tuple[int, int, int, _User]] = []
        self._pending: dict[str, _Pending] = {}
        self._orders = itertools.count()
        self._finished: list[Result] = []
        self.num_users = 0
        """Users begun and not finished."""

    def run(self, next_work: Callable[[], Work | None]) -> Iterator[Result]:
        """Results as users finish, in any order.

        Args:
            next_work: the next user, or None when there is none at the moment.

        Raises:
            EngineError: the engine is gone.
        """
        while True:
            self._fill(next_work)
            finished, self._finished = self._finished, []
            yield from finished
            if self._pending:
                for completion in self.engine.poll():
                    self._complete(completion)
            elif not finished:
                return

    def _fill(self, next_work: Callable[[], Work | None]) -> None:
        """Submit until the engine is full, admitting users as room appears."""
        while len(self._pending) < self.engine.capacity:
            if self._ready:
                *_, position, user = heapq.heappop(self._ready)
                self._start(user, position)
                continue
            if max(len(self._finished), self.num_users // USERS_PER_PLACE) >= self.engine.capacity:
                return
            work = next_work()
            if work is None:
                return
            self._admit(work)

    def _admit(self, work: Work) -> None:
        size = len(work.plan)
        user = _User(work, [None] * size, heights(work.plan), children(work.plan), next(self._orders), size)
        for position, node in enumerate(work.plan):
            if not node.parents:
                self._push(user, position)
        self.num_users += 1
        if not size:
            self._finish(Result(work.tag, ()))

    def _push(self, user: _User, position: int) -> None:
        heapq.heappush(self._ready, (-user.height[position], user.order, position, user))

    def _start(self, user: _User, position: int) -> None:
        if user.failure and position > user.failure.node:
            self._lose(user, position)
            return
        node = user.work.plan[position]
        previous = [user.records[parent]["text"] for parent in node.parents]
        prompt = node_prompt(node, user.work.items, previous, self.domain)
        hashed = prompt_hash(prompt)
        key = text_key(self.identity, hashed)
        if key in self._pending:
            self._pending[key].waiting.append((user, position))
            return
        record = self.cache.get(key)
        if record is not None:
            self.counts.cache_hits += 1
            self._deliver(record, [(user, position)])
            return
        self.counts.requests += 1
        request = Request(key, prompt, self.max_new_tokens, self.temperature, hash64(self.seed, key) >> 1)
        self._pending[key] = _Pending(request, hashed, [(user, position)])
        self.engine.submit(request)

    def _complete(self, completion: Completion) -> None:
        pending = self._pending.pop(completion.key)
        self.counts.prompt_tokens += completion.prompt_tokens
        self.counts.new_tokens += completion.new_tokens
        if completion.error and pending.first is None:
            self._fail(pending.waiting, completion.key, completion.error)
            return
        record = pending.first if completion.error else self._record(completion, pending)
        if set(record["flags"]) - {"cut"} and pending.first is None:  # another text would hit the limit too
            # Once more, alone and sampled: the same greedy text would come again.
            self.counts.retries += 1
            old, temperature = pending.request, self.temperature or RETRY_TEMPERATURE
            request = replace(old, temperature=temperature, seed=hash64("retry", old.key) >> 1)
            self._pending[old.key] = _Pending(request, pending.prompt, pending.waiting, record)
            self.engine.submit(request)
            return
        if pending.first is not None and _faults(pending.first) <= _faults(record):
            record = pending.first
        if "empty" in record["flags"]:
            reason = "the engine wrote no text, and none when sampled"
            if "cut" in record["flags"]:
                reason += (
                    f": its thoughts took all of summarize.max_new_tokens={self.max_new_tokens}; raise that, or turn "
                    "thoughts off with summarize.chat_template_kwargs"
                )
            self._fail(pending.waiting, completion.key, reason)
            return
        self.cache.add(record)
        for flag in record["flags"]:
            self.counts.flags[flag] = self.counts.flags.get(flag, 0) + 1
        self._deliver(record, pending.waiting)

    def _record(self, completion: Completion, pending: _Pending) -> dict[str, Any]:
        text, run_on = clean(completion.text) if completion.generated else (one_line(completion.text), False)
        record = {
            "key": completion.key,
            "prompt": pending.prompt,
            "text": text,
            "flags": list(flags_of(text, pending.request.prompt, run_on, completion.cut)),
            "prompt_tokens": completion.prompt_tokens,
            "new_tokens": completion.new_tokens,
        }
        if completion.words_cut:
            record["words_cut"] = completion.words_cut
        if pending.first is not None:
            record["sampled"] = True
        return record

    def _deliver(self, record: dict[str, Any], waiting: list[tuple[_User, int]]) -> None:
        for user, position in waiting:
            self.counts.nodes += 1
            user.records[position] = record
            for child in user.children[position]:
                if all(user.records[parent] for parent in user.work.plan[child].parents):
                    self._push(user, child)
            self._settle(user, 1)

    def _fail(self, waiting: list[tuple[_User, int]], key: str, reason: str) -> None:
        # The nodes that stand before it go on: which failure is told must not depend on the order of the answers.
        for user, position in waiting:
            self.counts.failures += user.failure is None
            if user.failure is None or position < user.failure.node:
                user.failure = Failure(position, key, reason)
            self._lose(user, position)

    def _lose(self, user: _User, position: int) -> None:
        num_lost, stack = len(user.lost), [position]
        while stack:
            if (node := stack.pop()) not in user.lost:
                user.lost.add(node)
                stack += user.children[node]
        self._settle(user, len(user.lost) - num_lost)

    def _settle(self, user: _User, num_nodes: int) -> None:
        """Count nodes as written or lost; the last one gives the user's result."""
        user.left -= num_nodes
        if not user.left:
            self._finish(Result(user.work.tag, () if user.failure else tuple(user.records), user.failure))

    def _finish(self, result: Result) -> None:
        self.num_users -= 1
        self._finished.append(result)


def _faults(record: dict[str, Any]) -> tuple[bool, int]:
    """No text is worse than any other fault."""
    return "empty" in record["flags"], len(record["flags"])
