"""Rank 0 acts for all: its result and its failures reach every rank at once."""

from __future__ import annotations

import time

from tests.spawn import run_ranks
from trsr_dist.distributed import on_rank_zero
from trsr_dist.errors import DataError

FAILURES = {"ours": DataError("bad row 7"), "another": ZeroDivisionError("division by zero")}


def outcome(rank: int, world_size: int, kind: str) -> tuple[str, str, bool]:
    def action() -> int:
        if kind in FAILURES:
            raise FAILURES[kind]
        return 40 + rank

    started = time.monotonic()
    try:
        value = str(on_rank_zero(action))
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started < 60
    return "none", value, True


def test_what_rank_zero_does_reaches_all() -> None:
    assert run_ranks(outcome, 2, "fine") == [("none", "40", True)] * 2
    assert run_ranks(outcome, 2, "ours") == [("DataError", "bad row 7", True)] * 2


def test_an_unforeseen_failure_of_rank_zero_hangs_nobody() -> None:
    first, second = run_ranks(outcome, 2, "another")
    assert first == ("ZeroDivisionError", "division by zero", True)
    assert second == ("RunError", "rank 0 has failed; its own error says why", True)
