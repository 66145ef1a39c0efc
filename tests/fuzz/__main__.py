"""Run the cases, print and write how they ended; exit status 1 where one ended as it must not.

example: python -m tests.fuzz --seed 0 --scale 0.1 --only raw,config
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from trsr_dist.environment import prepare_process

prepare_process(num_threads=1)

from tests.fuzz.kinds import KINDS  # noqa: E402
from tests.fuzz.running import BAD, RESULTS, Outcome, run_cases  # noqa: E402


def main() -> int:
    """Parse, run, count."""
    args = parse_arguments()
    if args.case:
        return run_case(args.case)
    started = time.monotonic()
    counts: dict[str, Counter[str]] = {}
    bad: list[Outcome] = []
    for name in args.only:
        kind = KINDS[name]
        counts[name] = Counter()
        for outcome in run_cases(kind, args.seed, range(max(1, round(kind.number * args.scale)))):
            counts[name][outcome.result] += 1
            if outcome.result in BAD:
                bad.append(outcome)
                print(outcome.line(), flush=True)
        print(row(name, counts[name]), f"{time.monotonic() - started:7.0f} s", flush=True)
    total = sum(counts.values(), Counter())
    print(row("all", total), f"{time.monotonic() - started:7.0f} s")
    if args.output:
        write(args.output, args.seed, time.monotonic() - started, counts, bad)
    return 1 if bad else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    add("--scale", type=float, default=1.0, metavar="X", help="share of the full number of cases (default: 1)")
    add("--only", type=lambda text: text.split(","), default=list(KINDS), metavar="KINDS", help=",".join(KINDS))
    add("--case", metavar="KIND:SEED:NUMBER", help="run one case again, and keep its folder")
    add("--output", type=Path, metavar="FILE", help="write the counts and the bad cases there as JSON")
    return parser.parse_args()


def run_case(name: str) -> int:
    """One case, whose folder stays."""
    kind, seed, number = name.split(":")
    folder = Path(tempfile.mkdtemp(prefix="kept-fuzz-"))
    folder.chmod(0o755)
    (outcome,) = run_cases(KINDS[kind], int(seed), [int(number)], folder)
    print(f"{outcome.result}: {outcome.title}\n{outcome.detail}\nkept: {folder}")
    return 1 if outcome.result in BAD else 0


def row(name: str, counts: Counter[str]) -> str:
    """Counts in one line."""
    return f"{name:8}" + "".join(f"{result} {counts[result]:5}   " for result in RESULTS)


def write(path: Path, seed: int, seconds: float, counts: dict[str, Counter[str]], bad: list[Outcome]) -> None:
    """What was counted, for those who compare runs."""
    kinds = {name: {result: found[result] for result in RESULTS} for name, found in counts.items()}
    value = {"seed": seed, "seconds": round(seconds), "kinds": kinds, "bad": [outcome.line() for outcome in bad]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
