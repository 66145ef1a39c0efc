"""Compare two evaluations of the same users and candidates: paired difference, 95% interval, p-value (sign flips).

A and B are evaluation folders, or folders of part files such as RUN/evaluation/test/control.
"""

from __future__ import annotations

import argparse

from trsr_dist.cli import command_parser, path, run_command
from trsr_dist.evaluate.compare import compare
from trsr_dist.log import show

EXAMPLE = "python tools/compare.py runs/one/evaluation runs/two/evaluation"


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("a", type=path, metavar="A")
    parser.add_argument("b", type=path, metavar="B")
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    parser.add_argument("--top-k", type=int, nargs="+", default=[3, 5, 10], metavar="K", help="cut-offs")
    parser.add_argument("--samples", type=int, default=10000, help="resamples and sign vectors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unfinished", action="store_true", help="compare the users that both have")
    return parser


def main() -> None:
    """Print the table."""
    parser = build_parser()
    args = parser.parse_args()
    if min(*args.top_k, args.samples) < 1 or args.seed < 0:
        parser.error("--top-k and --samples are 1 or more, --seed is 0 or more")
    show(compare((args.a, args.b), args.split, args.top_k, args.samples, args.seed, args.unfinished))


if __name__ == "__main__":
    run_command(main)
