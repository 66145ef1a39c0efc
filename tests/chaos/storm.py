"""One schedule: faults in bursts while a chain runs, and its user, until all faults are spent and the chain is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

from tests.chaos.chain import DONE, STAGES, Row
from tests.chaos.faults import KINDS, Effect, ImpossibleError, World

SHARES = dict(zip(STAGES, (0.06, 0.28, 0.04, 0.38, 0.06, 0.18), strict=True))
"""Of the faults; what a stage leaves goes to the next."""
LONG = ("summarize", "train")
"""Stages that write as they go."""
APART_SECONDS = (2.0, 6.0)
BURSTS = (1, 2, 2, 3)
PATIENCE_SECONDS = 150.0
"""A user who sees nothing new for so long cancels the jobs and submits them again."""
MOST_SUBMISSIONS = 40
ENDING = ("preemption", "requeue", "cancel")
"""These end a running job for certain, whatever it runs on."""


class Storm:
    """
    Args:
        world: what to disturb.
        num_faults: of the schedule.
        draw: kinds, times and numbers.
        kinds: names of the faults that may come.
        log: gets a line for every event.
    """

    def __init__(
        self, world: World, num_faults: int, draw: Random, kinds: list[str], log: Callable[[str], None]
    ) -> None:
        self._world, self._draw, self._kinds, self._log = world, draw, kinds, log
        self._num_faults, self.counts = num_faults, dict.fromkeys(kinds, 0)
        self._undos: list[tuple[float, Effect]] = []
        self._began, self._phase = time.monotonic(), STAGES[0]
        self._quota = {stage: share * num_faults for stage, share in SHARES.items()}
        self._burst, self._is_first, self._next = 0, True, 0.0
        self._seen: tuple[object, ...] = ()
        self._is_finished = False
        self._news, self._news_at = 0, time.monotonic()

    @property
    def num_done(self) -> int:
        return sum(self.counts.values())

    def say(self, text: str) -> None:
        self._log(f"{time.monotonic() - self._began:7.1f} s  {self._phase:10}  {text}")

    def run(self, limit_seconds: float) -> None:
        """
        Raises:
            AssertionError: the chain is not done in time.
        """
        try:
            while not self._is_over():
                assert time.monotonic() - self._began < limit_seconds, self._world.chain.last_words()
                time.sleep(0.3)
        finally:
            self._undo(float("inf"))

    def _is_over(self) -> bool:
        self._undo(time.monotonic())
        if self._is_finished:
            return not self._undos and not self._world.chain.others()
        rows = self._world.chain.queue()
        if rows:
            running = [row for row in rows if row.is_running]
            self._enter((running or rows)[0].stage)
            if self.num_done < self._num_faults and self._is_time(running):
                self._strike((running or rows)[0])
            self._watch(rows)
        elif rows is not None:
            self._user_submits()
        return False

    def _user_submits(self) -> None:
        said = self._world.chain.submit()
        self._is_finished = said == DONE
        if self._is_finished:  # on a node that Slurm has drained, urgent jobs would wait for ever
            self._world.lab.run("scancel --state=PENDING --name=urgent", check=False)
        self.say(f"user: {said}")
        assert self._world.chain.num_submissions <= MOST_SUBMISSIONS, self._world.chain.last_words()

    def _enter(self, stage: str) -> None:
        if stage == self._phase:
            return
        self._phase = stage
        for earlier in STAGES[: STAGES.index(stage)]:
            self._quota[stage] += self._quota[earlier]
            self._quota[earlier] = 0.0
        self.say("begins")

    def _is_time(self, running: list[Row]) -> bool:
        now = time.monotonic()
        is_last = self._phase == STAGES[-1]  # which must not end before all faults are spent
        if self._quota[self._phase] < 0.5 or now < self._next and (self._burst or not is_last):
            return False
        if self._burst:
            # What is left of a burst meets another start of the job, which must not end before all faults are spent.
            self._is_first |= is_last and bool(running) and self._mark(running[0]) != self._seen
            return True
        if not running or self._mark(running[0]) == self._seen:
            return False
        self._burst, self._is_first = self._draw.choice(BURSTS), True
        if not is_last and self._draw.random() < 0.5:
            self._next = now + self._draw.uniform(1, 4)
        return is_last or now >= self._next

    def _mark(self, row: Row) -> tuple[str, object]:
        """Changes with every sign of progress; of a stage that writes at its end only, with every start."""
        chain = self._world.chain
        return self._phase, chain.progress() if self._phase in LONG else (row.start, chain.num_starts(self._phase))

    def _strike(self, row: Row) -> None:
        is_ending = self._phase == STAGES[-1] and self._is_first
        # A twin of the last stage may end the chain before all faults are spent.
        is_early = self._phase == STAGES[-1] and self.num_done < self._num_faults - 1
        allowed = ENDING if is_ending else [kind for kind in self._kinds if kind != "twin" or not is_early]
        kinds = [kind for kind in self._kinds if kind in allowed]
        # What has come seldom, since it is seldom possible, comes first.
        kind = self._draw.choices(kinds, [(1 + self.counts[kind]) ** -2.0 for kind in kinds])[0]
        try:
            effect = KINDS[kind](self._world, row)
        except ImpossibleError:
            return
        self.counts[kind] += 1
        self._quota[self._phase] -= 1
        self.say(f"{self.num_done:3} {kind}: {effect.said}" + (f", for {effect.seconds:.0f} s" if effect.undo else ""))
        if effect.undo:
            self._undos.append((time.monotonic() + effect.seconds, effect))
            self._world.broken.add(effect.target)
        self._burst, self._is_first, self._seen = self._burst - 1, False, self._mark(row)
        self._next = time.monotonic() + self._draw.uniform(*APART_SECONDS)

    def _undo(self, until: float) -> None:
        for entry in [entry for entry in self._undos if entry[0] <= until]:
            self._undos.remove(entry)
            self._world.broken.discard(entry[1].target)
            entry[1].undo()
            self.say(f"    undone: {entry[1].said}")

    def _watch(self, rows: list[Row]) -> None:
        news = hash((self._world.chain.progress(), tuple(rows)))
        now = time.monotonic()
        if news != self._news:
            self._news, self._news_at = news, now
        elif now - self._news_at > PATIENCE_SECONDS:
            self.say("user: nothing new, jobs cancelled")
            self._world.lab.run(f"scancel {' '.join(row.job for row in rows)}", check=False)
            self._news_at = now
