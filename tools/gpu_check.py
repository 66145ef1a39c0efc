"""Everything that only a GPU can show, in one run: its tests and benchmarks, as a markdown and a JSON file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trsr_dist.environment import prepare_process

prepare_process()
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks.report import check_gpu  # noqa: E402
from trsr_dist.cli import path, run_command  # noqa: E402


def main() -> int:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/gpu_check.py")
    parser.add_argument("--output", type=path, default=Path("docs"), metavar="DIR", help="default: docs")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the rows' length (default: 1)")
    parser.add_argument(
        "--note", default="", metavar="TEXT", help="stands in the report, such as how a package was built"
    )
    args = parser.parse_args()
    return check_gpu(args.output, args.scale, args.note)


if __name__ == "__main__":
    run_command(main)
