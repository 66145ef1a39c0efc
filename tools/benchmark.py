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

from trsr_dist.benchmarks.common import SUITES, as_json, load_suite, table  # noqa: E402
from trsr_dist.cli import run_command  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/benchmark.py --suite stream")
    parser.add_argument("--suite", required=True, choices=[*SUITES, "all"], help="which suite")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the sizes (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()
    rows = [row for name in chosen(args.suite) for row in load_suite(name)(args.scale)]
    print("\n".join(json.dumps(as_json(row)) for row in rows) if args.json else table(rows))


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
