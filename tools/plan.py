"""Forecast time, memory, device hours and money of a run, before it is paid; for any number of nodes, in seconds.

Summaries are estimated from RUN/histories, training and evaluation from RUN/shards, or from the histories where there
are no shards yet; of the models only config.json is read, and the tokenizer.
"""

from __future__ import annotations

import argparse

from trsr_dist.environment import prepare_process

prepare_process()

from trsr_dist.cli import cluster_options, config_parser, parse_config, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    from trsr_dist.planner.job import STAGES

    example = "python tools/plan.py --config configs/mind.yaml --hardware h100 --nodes 4 --price 2.5"
    parser = cluster_options(config_parser(__doc__, example))
    parser.add_argument("--stage", action="append", choices=STAGES, help="may stand several times (default: all)")
    parser.add_argument("--json", action="store_true", help="print seconds, bytes and counts as JSON")
    return parser


def main() -> None:
    """Print the forecast."""
    args, config = parse_config(build_parser())
    from trsr_dist.log import show
    from trsr_dist.planner.job import STAGES, cluster_of, plan_stages
    from trsr_dist.planner.text import in_json, in_words

    describe = in_json if args.json else in_words
    cluster = cluster_of(args)
    show(describe(plan_stages(config, args.stage or STAGES, cluster.hardware.precision), cluster))


if __name__ == "__main__":
    run_command(main)
