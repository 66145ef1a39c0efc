"""Run the tests of each module against its mutants, and list those that survive.

Goes on where it was left: what is known is in build/mutants/, for the module's text, and for survivors the tests' too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mutants.mutate import Mutant, mutants_of
from tests.mutants.nursery import FACTOR, LEAST_SECONDS, Target, baseline, forget_project, run, warm_up

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent
BUILD = ROOT / "build/mutants"
MOST_SURVIVORS = 0.05
"""Share of all mutants."""


@dataclass
class Module:
    """A module of a table, with what is known of its mutants."""

    name: str
    """Path within ``trsr_dist/`` without its ending."""
    tests: tuple[str, ...]
    reasons: dict[str, str]
    """By mutant: why it may survive."""
    fates: dict[str, str] = field(default_factory=dict)
    """By mutant: killed, survived or timeout."""
    seconds: float = 0.0
    """CPU time of all its mutants."""

    @property
    def path(self) -> Path:
        return ROOT / "trsr_dist" / f"{self.name}.py"

    @property
    def target(self) -> Target:
        module = "trsr_dist." + self.name.replace("/", ".")
        return Target(module, self.path, self.tests, BUILD / self.name.replace("/", "."))

    @property
    def results(self) -> Path:
        return BUILD / f"{self.name.replace('/', '.')}.jsonl"

    @property
    def survivors(self) -> list[str]:
        return [name for name, fate in self.fates.items() if fate == "survived"]

    @property
    def unexplained(self) -> list[str]:
        return [name for name in self.survivors if name not in self.reasons]

    @property
    def stale(self) -> list[str]:
        return [name for name in self.reasons if self.fates.get(name) != "survived"]


def read_tables() -> list[Module]:
    """The modules of all ``*.toml`` beside this file."""
    modules = []
    for table in sorted(TABLES.glob("*.toml")):
        for name, entry in tomllib.loads(table.read_text()).items():
            harmless = entry.get("harmless", [])
            reasons = {mutant: group["reason"] for group in harmless for mutant in group["mutants"]}
            modules.append(Module(name, tuple(entry["tests"]), reasons))
    return modules


def run_module(module: Module, jobs: int) -> None:
    """Find the fate of every mutant of the module; all of it in a separate process."""
    mutants = mutants_of(module.path.read_text())
    # Again where the tests were edited meanwhile: survivors of other tests do not count.
    while todo := _unknown(module, mutants):
        if os.waitpid(in_fork(lambda todo=todo: serve(module, todo, jobs)), 0)[1]:
            raise SystemExit(f"{module.name}: not run to its end")
    found = known(module)
    module.fates = {mutant.name: found[mutant.name]["fate"] for mutant in mutants}
    module.seconds = sum(found[mutant.name]["seconds"] for mutant in mutants)


def _unknown(module: Module, mutants: list[Mutant]) -> list[Mutant]:
    found = known(module)
    return [mutant for mutant in mutants if mutant.name not in found]


def known(module: Module) -> dict[str, dict[str, Any]]:
    """Results by mutant, as far as they hold for the module and its tests as they are now."""
    source, tests = hashes(module)
    lines = module.results.read_text().splitlines() if module.results.exists() else []
    entries = [entry for entry in map(json.loads, lines) if entry["source"] == source]
    return {e["mutant"]: e for e in entries if e["fate"] != "survived" or e["tests"] == tests}


def hashes(module: Module) -> tuple[str, str]:
    """Of the module's text and of its tests'."""
    files = [path for test in module.tests for path in files_of(test)]
    texts = [module.path.read_bytes(), b"".join(path.read_bytes() for path in files)]
    source, tests = (hashlib.sha256(text).hexdigest()[:16] for text in texts)
    return source, tests


def files_of(argument: str) -> Iterator[Path]:
    """Test files that an argument of pytest names; none where it is an option."""
    path = ROOT / argument.partition("::")[0]
    if not argument.startswith("-") and path.exists():
        yield from sorted(path.rglob("test_*.py")) if path.is_dir() else [path]


def serve(module: Module, mutants: list[Mutant], jobs: int) -> None:
    """Be the module's nursery: run these mutants in as many workers as jobs."""
    from trsr_dist.environment import prepare_process

    prepare_process(num_threads=1)
    forget_project()
    warm_up(baseline(module.target, module.path.read_text())[1])
    seconds, _ = baseline(module.target, module.path.read_text())
    print(f"{module.name}: {len(mutants)} mutants to run, {seconds:.1f} CPU seconds without one", flush=True)
    limit = max(LEAST_SECONDS, FACTOR * seconds)
    workers = [in_fork(lambda first=first: work(module, mutants[first::jobs], limit)) for first in range(jobs)]
    if sum(os.waitpid(worker, 0)[1] for worker in workers):
        raise SystemExit(f"{module.name}: a worker failed")


def work(module: Module, mutants: list[Mutant], limit_seconds: float) -> None:
    """Run these mutants one by one; each result is a line of the module's file as soon as it is known."""
    source, tests = hashes(module)
    for mutant in mutants:
        fate, seconds = run(module.target, mutant.source, limit_seconds)
        entry = {"mutant": mutant.name, "fate": fate, "seconds": round(seconds, 2), "source": source, "tests": tests}
        with module.results.open("a") as results:
            results.write(json.dumps(entry) + "\n")


def in_fork(function: Callable[[], None]) -> int:
    """Process id of a fork that runs the function and ends."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function()
        code = 0
    except SystemExit as error:
        print(error, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def report(modules: list[Module]) -> None:
    """Print in Markdown a row for each module and the reasons, and below them the survivors without one."""
    print("\n| module | mutants | killed | timeouts | survivors | explained | CPU-s |\n|---|--:|--:|--:|--:|--:|--:|")
    total: Counter[str] = Counter()
    for module in modules:
        counts = Counter(module.fates.values())
        counts["explained"] = len(module.survivors) - len(module.unexplained)
        print(_row(module.name, counts, module.seconds))
        total += counts
    print(_row("all", total, sum(module.seconds for module in modules)))
    print("\nWhy the others may survive:\n")
    for module in modules:
        reasons = Counter(module.reasons[name] for name in module.survivors if name in module.reasons)
        for reason, count in reasons.items():
            print(f"- {module.name} ({count}): {reason}")
    for module in modules:
        for title, names in (("no reason is given for", module.unexplained), ("no longer survives", module.stale)):
            if names:
                print(f"\n{module.name}: {title}", *names, sep="\n  ")


def _row(name: str, counts: Counter[str], seconds: float) -> str:
    num = sum(counts[fate] for fate in ("killed", "survived", "timeout"))
    share = f"{counts['survived']} ({counts['survived'] / max(1, num):.1%})"
    cells = (name, num, counts["killed"], counts["timeout"], share, counts["explained"], round(seconds))
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Parse, run, report; exit status 1 where a survivor has no reason, or more than 5% survive."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help="such as evaluate/metrics, or a folder such as shards; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="forks at a time (default: 2)")
    args = parser.parse_args()
    modules = read_tables()
    wanted = [m for m in modules if not args.modules or any(_is_in(m.name, name) for name in args.modules)]
    if not wanted:
        parser.error(f"no such module; the tables have {', '.join(module.name for module in modules)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    for module in wanted:
        run_module(module, args.jobs)
    report(wanted)
    num = sum(len(module.fates) for module in wanted)
    survivors = sum(len(module.survivors) for module in wanted)
    sys.exit(any(module.unexplained for module in wanted) or survivors > MOST_SURVIVORS * num)


def _is_in(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name.rstrip('/')}/")


if __name__ == "__main__":
    main()
