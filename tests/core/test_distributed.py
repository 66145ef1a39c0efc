"""Rank 0 acts for all: its result and its failures reach every rank at once."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from tests.spawn import free_port, run_ranks
from trsr_dist.distributed import gather_on_rank_zero, on_rank_zero, once_per_node
from trsr_dist.environment import Ranks
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


def act_patiently(rank: int, world_size: int, port: int) -> list[tuple[str, int]]:
    """An action that takes longer than a collective may, then two that fail: the errors' texts, and who has acted."""
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=4))
    acted, outcomes = [], []

    def act(failure: str) -> None:
        acted.append(failure)
        if failure:
            raise FAILURES[failure]
        time.sleep(6)

    for failure in ("", "ours", "another"):
        try:
            once_per_node(partial(act, failure), Ranks(rank, world_size, rank, world_size, "here"), 60)
            outcomes.append(("", len(acted)))
        except Exception as error:
            outcomes.append((f"{type(error).__name__}: {error}", len(acted)))
    return outcomes


def test_one_rank_of_a_node_may_take_its_time() -> None:
    first, second = run_ranks(act_patiently, 2, free_port())
    assert first == [("", 1), ("DataError: bad row 7", 2), ("ZeroDivisionError: division by zero", 3)]
    told = "RunError: rank 0 on here has failed; its own error says why"
    assert second == [("", 0), ("DataError: bad row 7", 0), (told, 0)]


def test_what_rank_zero_does_reaches_all() -> None:
    assert run_ranks(outcome, 2, "fine") == [("none", "40", True)] * 2
    assert run_ranks(outcome, 2, "ours") == [("DataError", "bad row 7", True)] * 2


def test_an_unforeseen_failure_of_rank_zero_hangs_nobody() -> None:
    first, second = run_ranks(outcome, 2, "another")
    assert first == ("ZeroDivisionError", "division by zero", True)
    assert second == ("RunError", "rank 0 has failed; its own error says why", True)


def gather_some(rank: int, world_size: int, sizes: list[int]) -> list[list[int]]:
    """Ranks with 0, 1 and so on, as often as their size says."""
    return [part.tolist() for part in gather_on_rank_zero(torch.full((sizes[rank],), rank), sizes)]


def test_ranks_of_unequal_sizes_are_gathered_on_the_first() -> None:
    assert run_ranks(gather_some, 3, [1, 3, 0]) == [[[0], [1, 1, 1], []], [], []]
    assert run_ranks(gather_some, 2, [2, 0]) == [[[0, 0], []], []]
    assert gather_some(0, 1, [2]) == [[0, 0]]
