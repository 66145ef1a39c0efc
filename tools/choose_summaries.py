"""Choose of each train user's sampled summaries that with which a ranker ranks best, for the summarizer to learn from.

First: launch/summarize.py summarize.samples=N summarize.temperature=T, then tools/score_shards.py, both with this
config. Writes RUN/samples/chosen, a data set for TRL; docs/recipes.md has the commands that follow.
"""

import argparse

from trsr_dist.environment import expand_home, prepare_process

prepare_process()

from trsr_dist.cli import config_parser, parse_config, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    example = (
        "python tools/choose_summaries.py --config configs/smollm2.yaml --model RUN/merged summarize.samples=4 "
        "summarize.temperature=0.8"
    )
    parser = config_parser(__doc__, example)
    add = parser.add_argument
    add("--model", required=True, type=expand_home, metavar="DIR", help="as it was given to tools/score_shards.py")
    add("--min-gain", type=float, default=0.0, metavar="X", help="nats that the best must be above the worst")
    return parser


def main() -> int:
    args, config = parse_config(build_parser())
    from trsr_dist.evaluate.choosing import choose_summaries

    return choose_summaries(config, args.model, args.min_gain, args.force, args.dry_run)


if __name__ == "__main__":
    run_command(main)
