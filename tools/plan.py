"""Forecast time, memory, device hours and money of a run, before it is paid; for any number of nodes, in seconds.

Summaries are estimated from RUN/histories, training and evaluation from RUN/shards, or from the histories where there
are no shards yet; of the models only config.json is read, and the tokenizer.
"""

from __future__ import annotations

from trsr_dist.cli import cluster_options, config_parser, parse_config, run_command


def main() -> None:
    """Print the forecast."""
    example = "python tools/plan.py --config configs/mind.yaml --hardware h100 --nodes 4 --price 2.5"
    parser = cluster_options(config_parser(__doc__, example))
    stages = ("summarize", "train", "evaluate")
    parser.add_argument("--stage", action="append", choices=stages, help="may stand several times (default: all)")
    parser.add_argument("--json", action="store_true", help="print seconds, bytes and counts as JSON")
    args, config = parse_config(parser)
    from trsr_dist.log import show
    from trsr_dist.planner.job import Request, plan_stages
    from trsr_dist.planner.text import in_json, in_words

    describe = in_json if args.json else in_words
    cluster = Request.of(args).cluster
    show(describe(plan_stages(config, args.stage or stages, cluster.hardware.precision), cluster))


if __name__ == "__main__":
    run_command(main)
