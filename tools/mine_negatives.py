"""Keep the hard negatives in the pools of the train users, by the scores that tools/score_shards.py has put there.

A negative whose odds are above --margin times those of the positive is kept out: it may be one that the user would
have liked. The pool lies beside the train shards; train.pool=mined draws from it.
"""

import argparse
import math

from trsr_dist.environment import expand_home, prepare_process

prepare_process()

from trsr_dist.cli import config_parser, parse_config, positive, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    example = "python tools/mine_negatives.py --config configs/quickstart.yaml --model RUN/merged --negatives 8"
    parser = config_parser(__doc__, example)
    add = parser.add_argument
    add("--model", required=True, type=expand_home, metavar="DIR", help="as it was given to tools/score_shards.py")
    add("--negatives", required=True, type=positive, metavar="N", help="that stay, per positive")
    add("--margin", default=0.95, type=share, metavar="X", help="of the odds, see above (default: %(default)s)")
    return parser


def share(text: str) -> float:
    """The type of --margin."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def main() -> int:
    args, config = parse_config(build_parser())
    from trsr_dist.evaluate.teacher import mine_negatives

    return mine_negatives(config, args.model, args.negatives, args.margin, args.force, args.dry_run)


if __name__ == "__main__":
    run_command(main)
