"""Put the evaluations of several runs into one table: OUTPUT.md and OUTPUT.json.

Runs with the same candidate lists, users and metrics share a table. Beside each stand what the settings of its training
and evaluation change in the shared config, the control, the paired differences to BM25 and SASRec, and what it cost. An
earlier table's rows are kept by naming its .json first: of rows of one run in one table the last stays. What OUTPUT.md
says above the line of its command is kept.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from trsr_dist.cli import command_parser, path, run_command
from trsr_dist.config import load_config
from trsr_dist.evaluate.leaderboard import gather_entries, write_leaderboard

EXAMPLE = "python tools/leaderboard.py runs/real-* --config configs/smollm2.yaml --output docs/real_results"


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="evaluated runs, or the .json of a table")
    parser.add_argument("--config", type=path, required=True, metavar="FILE", help="the shared config")
    parser.add_argument("--output", type=path, required=True, metavar="NAME", help="without suffix")
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    return parser


def main() -> None:
    """Read the runs, write the table."""
    args = build_parser().parse_args()
    entries = gather_entries(args.runs, load_config(args.config), args.split)
    command = f"python tools/leaderboard.py {shlex.join(sys.argv[1:])}"
    write_leaderboard(entries, command, args.output)


if __name__ == "__main__":
    run_command(main)
