"""What the code imports is what setup.py installs."""

import ast
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("trsr_dist", "benchmarks", "launch", "tools")
OPTIONAL = {"vllm", "flash_attn", "trl", "datasets"}
"""Not installable beside the pinned set: their modules say what to install where they are chosen."""


def imported() -> dict[str, str]:
    """Top-level packages from elsewhere, each with a place where it is imported."""
    found: dict[str, str] = {}
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                found |= {name.partition(".")[0]: f"{path.relative_to(ROOT)}:{node.lineno}" for name in names}
    return {name: place for name, place in found.items() if name not in {*sys.stdlib_module_names, *OURS}}


def named_in_setup() -> set[str]:
    """Requirements of setup.py in their canonical spelling, those of extras too."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    lists = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    extras = ast.literal_eval(lists["EXTRAS"])
    wanted = [*ast.literal_eval(lists["INSTALL"]), *(name for names in extras.values() for name in names)]
    return {canonical(name) for name in wanted}


def canonical(requirement: str) -> str:
    name = requirement.partition("[")[0]
    for mark in "<>=!~ ;":
        name = name.partition(mark)[0]
    return name.lower().replace("_", "-").replace(".", "-")


def test_setup_names_every_package_that_is_imported() -> None:
    packages, named, found = metadata.packages_distributions(), named_in_setup(), imported()
    assert len(found) > 10 and {"torch", "jinja2", "huggingface_hub", "pydantic_core"} <= found.keys()
    missing = {
        name: place
        for name, place in found.items()
        if name not in OPTIONAL and not {canonical(owner) for owner in packages.get(name, [name])} & named
    }
    assert not missing


def test_constraints_pin_every_package_that_setup_names() -> None:
    pinned = {canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert named_in_setup() - pinned <= {"flash-attn", "flash-attn-4"}
