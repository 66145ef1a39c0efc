"""The mutants of a module: mutmut's operators, applied to all of its code, properties and constants included.

mutmut's own runner leaves decorated functions out, which here are much of what counts, and asks for tests that import
the mutated tree as a whole; so its operators are used and the running is ours (``nursery.py``).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import libcst as cst
from mutmut.mutation.file_mutation import deep_replace
from mutmut.mutation.mutators import mutation_operators

SWAPPED = {"min": "max", "minimum": "maximum", "argmin": "argmax", "any": "all", "floor": "ceil", "sorted": "list"}
SWAPS = SWAPPED | {other: one for one, other in SWAPPED.items() if other != "list"}
"""Calls that mutmut does not know of."""
NOT_MUTATED = (cst.Annotation, cst.Decorator, cst.Raise, cst.Assert, cst.Import, cst.ImportFrom)
"""Types, flags of dataclasses and the texts of errors decide no number."""
EQUAL = "[[False -> None]]"
"""Both are false; that False is needed, its change to True says."""
CHECKS = ("strict",)
"""Arguments that only check."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a module."""

    name: str
    """Function and changed line, ``[[old -> new]]`` within it; stable while the line is."""
    source: str
    """Of the whole module."""


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a module, each different code once."""
    module = cst.parse_module(source)
    visitor = _Visitor()
    module.visit(visitor)
    seen, names, found = {_code(source)}, Counter(), []
    for function, old, new in visitor.mutations:
        mutated = cst.ensure_type(deep_replace(module, old, new), cst.Module).code
        code = _code(mutated)
        if code is None or code in seen:
            continue
        seen.add(code)
        name = f"{function}: {_change(source, mutated)}"
        if EQUAL in name:
            continue
        names[name] += 1
        found.append(Mutant(name if names[name] == 1 else f"{name} #{names[name]}", mutated))
    return found


def _code(source: str) -> str | None:
    """What is compared: the text; None where it is no Python."""
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def _change(old: str, new: str) -> str:
    """The changed lines, without their indents, with what is new in double brackets."""
    before, after = old.splitlines(), new.splitlines()
    first = len(os.path.commonprefix([before, after]))
    last = len(os.path.commonprefix([before[first:][::-1], after[first:][::-1]]))
    one = _words(before[first : len(before) - last])
    two = _words(after[first : len(after) - last])
    start = len(os.path.commonprefix([one, two]))
    end = len(os.path.commonprefix([one[start:][::-1], two[start:][::-1]]))
    head, tail = "".join(one[:start]), "".join(one[len(one) - end :])
    return f"{head}[[{''.join(one[start : len(one) - end])} -> {''.join(two[start : len(two) - end])}]]{tail}"


def _words(lines: Sequence[str]) -> list[str]:
    return re.findall(r"[\w.]+|[-+*/%@&|^<>=!]+|.", " ".join(line.strip() for line in lines))


class _Visitor(cst.CSTVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.mutations: list[tuple[str, cst.CSTNode, cst.CSTNode]] = []
        self._within: list[str] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, NOT_MUTATED) or _is_check(node):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._within.append(node.name.value)
        where = ".".join(self._within) or "module"
        self.mutations += [(where, node, mutated) for mutated in _mutated(node)]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self._within.pop()


def _mutated(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            yield from _without_checks(node, operator(node))
    if isinstance(node, cst.Call):
        yield from _swapped(node)


def _swapped(node: cst.Call) -> Iterator[cst.Call]:
    name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    if isinstance(name, cst.Name) and name.value in SWAPS:
        yield node.with_deep_changes(name, value=SWAPS[name.value])


def _is_check(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value in CHECKS


def _without_checks(node: cst.CSTNode, mutated: Iterable[cst.CSTNode]) -> Iterator[cst.CSTNode]:
    """mutmut changes a call's arguments at the call."""
    checks = [arg for arg in node.args if _is_check(arg)] if isinstance(node, cst.Call) else []
    for one in mutated:
        if all(any(arg is check for arg in one.args) for check in checks):
            yield one
