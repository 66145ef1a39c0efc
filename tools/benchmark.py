"""Run benchmark suites, ours and the alternatives in turns, and print what they measured.

The columns: value (median of the repetitions), spread (smallest to largest), bound (what counted operations or bytes
let expect), share (of the bound that is reached). CPU-s are CPU seconds of one thread.
"""

from trsr_dist.environment import prepare_process

prepare_process(num_threads=1)

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402

from trsr_dist.benchmarks.common import SUITES, as_json, load_suite, markdown, table  # noqa: E402
from trsr_dist.cli import run_command  # noqa: E402

ALL_SCALE = 0.5
"""All suites then take about ten minutes on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/benchmark.py --suite stream")
    parser.add_argument("--suite", required=True, choices=[*SUITES, "all"], help="which suite")
    parser.add_argument("--scale", type=float, help=f"multiplies the sizes (default: 1; all: {ALL_SCALE})")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--markdown", action="store_true", help="a markdown table, as in docs/benchmarks.md")
    args = parser.parse_args()
    scale = args.scale or (ALL_SCALE if args.suite == "all" else 1.0)
    for name in chosen(args.suite):
        rows = load_suite(name)(scale)
        if args.json:
            print("\n".join(json.dumps(as_json(row)) for row in rows), flush=True)
        else:
            print(markdown(rows) if args.markdown else table(rows), end="\n\n", flush=True)


def chosen(suite: str) -> tuple[str, ...]:
    """The suites to run; of all, the GPU's is left out where there is none."""
    if suite != "all":
        return (suite,)
    if torch.cuda.is_available():
        return SUITES
    print("gpu: left out, for PyTorch sees no GPU", file=sys.stderr)
    return SUITES[:-1]


if __name__ == "__main__":
    run_command(main)
