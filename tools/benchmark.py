"""Run benchmark suites, ours and the alternatives in turns, and print what they measured.

The columns: value (median of the repetitions), spread (smallest to largest), bound (what counted operations or bytes
let expect), share (of the bound that is reached). CPU-s are CPU seconds of one thread.
"""

import argparse
import sys
from pathlib import Path

from trsr_dist.environment import prepare_process

prepare_process(num_threads=1)
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks.common import json_lines, markdown, table  # noqa: E402
from benchmarks.suites import ALL, ALL_SCALE, SUITES, run_suites  # noqa: E402
from trsr_dist.cli import run_command  # noqa: E402


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/benchmark.py --suite stream")
    parser.add_argument("--suite", required=True, choices=[*SUITES, ALL], help="which suite")
    parser.add_argument("--scale", type=float, help=f"multiplies the sizes (default: 1; all: {ALL_SCALE})")
    parser.add_argument("--model", default="", metavar="DIR", help="serving: merged folder that is ranked with")
    parser.add_argument("--vllm", default="", metavar="FILE", help="serving: vLLM's command, such as bin/vllm")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", dest="show", const=json_lines, help="one JSON object a line")
    form.add_argument("--markdown", action="store_const", dest="show", const=markdown, help="a markdown table")
    args = parser.parse_args()
    options = {"serving": {"model": args.model, "vllm": args.vllm}}
    run_suites(args.suite, args.scale, args.show or table, options)


if __name__ == "__main__":
    run_command(main)
