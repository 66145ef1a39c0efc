"""Measures of a package's structure: ``python -m tests.core.house trsr_dist``, for any folder of Python modules.

Modules of fewer than five lines are left out, and so are tests. An import counts wherever it stands, in functions too,
but not under ``if TYPE_CHECKING``. Modules that import each other in a circle count as one step of a chain.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median

LEAST_LINES = 5
SMALL_LINES = 130
FUNCTION_LINES, FILE_LINES = 60, 400
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Module:
    """One file."""

    path: Path
    num_lines: int
    functions: list[tuple[str, int]]
    """Name and lines of each, nested ones and methods too."""
    imports: set[str] = field(default_factory=set)
    """Names of modules of the package."""


def read_package(folder: Path) -> dict[str, Module]:
    """Modules by their dotted name."""
    modules, trees = {}, {}
    root = folder
    while (root.parent / "__init__.py").exists():
        root = root.parent
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        num_lines = len(text.splitlines())
        if (
            num_lines < LEAST_LINES
            or {"tests", "test"} & set(path.relative_to(folder).parts)
            or path.name.startswith("test_")
        ):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(text)
        nodes = [node for node in ast.walk(trees[name]) if isinstance(node, FUNCTIONS)]
        modules[name] = Module(path, num_lines, [(node.name, node.end_lineno - node.lineno + 1) for node in nodes])
    for name, module in modules.items():
        is_package = module.path.name == "__init__.py"
        module.imports = {found for found in _imports(trees[name], name, is_package, modules.keys()) if found != name}
    return modules


def _imports(tree: ast.AST, name: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Modules of the package that a module imports; of ``from a import b`` the module ``a.b``, where it is one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parents = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from (
                    [f"{base}.{alias.name}"] if f"{base}.{alias.name}" in known else [base] if base in known else []
                )
        else:
            yield from _imports(node, name, is_package, known)


def longest_chain(modules: dict[str, Module]) -> list[str]:
    """Modules each of which imports the next; of modules in a circle, one."""
    reached = {name: _reachable(name, modules) for name in modules}
    circle = {name: min([name, *(other for other in reached[name] if name in reached[other])]) for name in modules}

    @cache
    def chain_from(head: str) -> tuple[str, ...]:
        members = [name for name in modules if circle[name] == head]
        below = {circle[found] for name in members for found in modules[name].imports} - {head}
        return (head, *max((chain_from(found) for found in sorted(below)), key=len, default=()))

    return list(max((chain_from(head) for head in sorted(set(circle.values()))), key=len))


def _reachable(name: str, modules: dict[str, Module]) -> set[str]:
    found, left = set(), [name]
    while left:
        for other in modules[left.pop()].imports - found:
            found.add(other)
            left.append(other)
    return found


def single_importers(modules: dict[str, Module]) -> list[tuple[str, str]]:
    """Small modules that one module imports, with that one."""
    importers = {name: [other for other, module in modules.items() if name in module.imports] for name in modules}
    small = [name for name, module in modules.items() if module.num_lines <= SMALL_LINES]
    return [(name, importers[name][0]) for name in small if len(importers[name]) == 1]


def spread(values: list[int]) -> str:
    """Median, 90th percentile and largest."""
    ordered = sorted(values)
    return f"{median(ordered):.0f} / {ordered[int(0.9 * (len(ordered) - 1))]} / {ordered[-1]}"


def measures(modules: dict[str, Module]) -> Iterator[str]:
    """One a line, then the lists."""
    lines = [module.num_lines for module in modules.values()]
    functions = [(f"{name}.{of}", size) for name, module in modules.items() for of, size in module.functions]
    chain, single = longest_chain(modules), single_importers(modules)
    long_functions = [f"{name}: {size}" for name, size in functions if size > FUNCTION_LINES]
    long_files = [f"{name}: {module.num_lines}" for name, module in modules.items() if module.num_lines > FILE_LINES]
    yield f"modules / lines               {len(modules)} / {sum(lines):,}"
    yield f"file median / p90 / max       {spread(lines)}"
    yield f"function median / p90 / max   {spread([size for _, size in functions])}"
    yield f"functions per 1,000 lines     {1000 * len(functions) / sum(lines):.1f}"
    yield f"longest import chain          {len(chain)}: {' > '.join(chain)}"
    yield f"modules of at most {SMALL_LINES} lines with one importer: {len(single)}"
    yield from (f"  {modules[name].num_lines:4} {name} < {importer}" for name, importer in single)
    for title, found in (
        (f"functions over {FUNCTION_LINES}", long_functions),
        (f"files over {FILE_LINES}", long_files),
    ):
        yield f"{title} lines: {len(found)}"
        yield from (f"  {text}" for text in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a package, such as trsr_dist")
    print("\n".join(measures(read_package(parser.parse_args().folder.resolve()))))


if __name__ == "__main__":
    main()
