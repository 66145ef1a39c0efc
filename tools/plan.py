"""Forecast time, memory, device hours and money of a run, before it is paid; for any number of nodes, in seconds.

Summaries are reckoned from RUN/histories, training and evaluation from RUN/shards; of the models only config.json is
read, and the tokenizer.
"""

from __future__ import annotations

from trsr_dist.cli import cluster_options, config_parser, parse_config, run_command


def main() -> None:
    """Print the forecast."""
    example = "python tools/plan.py --config configs/mind.yaml --hardware h100 --nodes 4 --price 2.5"
    parser = cluster_options(config_parser(__doc__, example))
    args, config = parse_config(parser)
    from trsr_dist.forecast.job import Forecast, Request

    request = Request(args.hardware, args.nodes, args.devices_per_node, args.mfu, args.price)
    print(Forecast(config, request).all())


if __name__ == "__main__":
    run_command(main)
