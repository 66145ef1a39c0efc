"""Run benchmark suites and print what they measured."""

from trsr_dist.environment import prepare_process

prepare_process(num_threads=1)

import argparse  # noqa: E402
import json  # noqa: E402
from dataclasses import asdict  # noqa: E402

from trsr_dist.benchmarks.common import load_suite, suites, table  # noqa: E402
from trsr_dist.cli import run_command  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/benchmark.py --suite stream")
    parser.add_argument("--suite", required=True, choices=[*suites(), "all"], help="which suite")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the sizes (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()
    names = suites() if args.suite == "all" else [args.suite]
    rows = [row for name in names for row in load_suite(name)(args.scale)]
    print("\n".join(json.dumps(asdict(row)) for row in rows) if args.json else table(rows))


if __name__ == "__main__":
    run_command(main)
