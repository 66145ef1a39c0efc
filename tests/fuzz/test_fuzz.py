"""A few cases of every kind end as they must, and the fuzzer notices what must not happen."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.running import BAD, CLEAR, HANG, SILENT, SUCCESS, TRACEBACK, UNCLEAR, Case, Kind, run_cases
from trsr_dist.errors import DataError

NUMBERS = {"raw": 50, "config": 50, "shards": 12, "models": 6, "server": 3}
SEED = 1


@pytest.mark.parametrize("name", KINDS)
def test_a_few_cases_end_well(name: str) -> None:
    outcomes = list(run_cases(KINDS[name], SEED, range(NUMBERS[name])))
    assert len(outcomes) == NUMBERS[name]
    assert [outcome.line() for outcome in outcomes if outcome.result in BAD] == []
    assert {outcome.result for outcome in outcomes} == {SUCCESS, CLEAR}


def refuse(text: str) -> Callable[[], None]:
    def act() -> None:
        raise DataError(text)

    return act


ENDS: dict[str, tuple[Callable[[], object], str]] = {
    "fine": (lambda: None, SUCCESS),
    "the file is named": (refuse("file.txt:3: two columns"), CLEAR),
    "no file is named": (refuse("something is wrong"), UNCLEAR),
    "a status without words": (lambda: 1, UNCLEAR),
    "an escape in a line": (lambda: print("\x1b[31m"), UNCLEAR),
    "an exception": (lambda: [][1], TRACEBACK),
    "no end": (lambda: time.sleep(60), HANG),
    "all memory": (lambda: bytes(8 << 30), TRACEBACK),
    "another value": (lambda: print("WRONG"), SILENT),
}


def make(draw: random.Random, folder: Path, end: Callable[[], int | None]) -> Case:
    return Case("x", end, ("file.txt",), lambda status, output: "wrong" * ("WRONG" in output))


@pytest.mark.parametrize("name", ENDS)
def test_every_bad_end_is_noticed(name: str) -> None:
    act, result = ENDS[name]
    kind = Kind("known", 1, 1.5, lambda folder: act, make)
    (outcome,) = run_cases(kind, 0, [7])
    assert (outcome.result, outcome.number) == (result, 7)
    assert result not in BAD or "--case known:0:7" in outcome.line()


def test_a_case_can_be_run_again_in_a_folder_that_stays(tmp_path: Path) -> None:
    (one,) = run_cases(KINDS["raw"], 3, [2], tmp_path)
    (other,) = run_cases(KINDS["raw"], 3, [2])
    assert (one.title, one.result) == (other.title, other.result)
    assert (tmp_path / "raw-2" / "raw").is_dir()
