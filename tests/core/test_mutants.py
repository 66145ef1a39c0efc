"""Mutants are of all code that decides numbers, and what the tables say of them is well formed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mutants.__main__ import ROOT, Module, files_of, in_fork, read_tables
from tests.mutants.mutate import mutants_of
from tests.mutants.nursery import Target, forget_project, run

SOURCE = """
from dataclasses import dataclass

LIMIT = 3


@dataclass(frozen=True)
class Pair:
    one: int

    @property
    def least(self) -> int:
        return min(self.one, LIMIT)


def add(one: int) -> int:
    if one < 0:
        raise ValueError("negative")
    return sum(zip([one], [1], strict=True)[0])
"""
TEST = """
from trsr_dist.hashing import add

def test_add():
    assert add(2) == 3
"""


def test_properties_and_constants_are_mutated_and_texts_and_checks_are_not() -> None:
    names = [mutant.name for mutant in mutants_of(SOURCE)]
    assert "module: LIMIT = [[3 -> 4]]" in names
    assert "Pair.least: return [[min -> max]](self.one, LIMIT)" in names
    assert "add: if one [[< -> <=]] 0:" in names
    assert len(names) == len(set(names))
    assert not any(
        word in mutant.source for mutant in mutants_of(SOURCE) for word in ("strict=False", "ValueError(None")
    )
    assert not any("frozen" in name for name in names)


@pytest.mark.parametrize(
    ("body", "fate"), [("one + 1", "survived"), ("one + 2", "killed"), ("sum(iter(int, 1))", "timeout")]
)
def test_a_fork_says_what_became_of_a_mutant(tmp_path: Path, body: str, fate: str) -> None:
    (tmp_path / "test_add.py").write_text(TEST)
    target = Target("trsr_dist.hashing", ROOT / "trsr_dist/hashing.py", (str(tmp_path / "test_add.py"),), tmp_path)
    found = tmp_path / "fate"

    def judge() -> None:
        forget_project()
        found.write_text(run(target, f"def add(one):\n    return {body}\n", 1)[0])

    assert os.waitpid(in_fork(judge), 0)[1] == 0
    assert found.read_text() == fate


@pytest.mark.parametrize("module", read_tables(), ids=lambda module: module.name)
def test_tables_name_what_is_there(module: Module) -> None:
    assert module.path.exists()
    assert all(list(files_of(test)) for test in module.tests if not test.startswith("-"))
    assert all(module.reasons.values())
