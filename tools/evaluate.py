"""Rank the held-out users' candidates with a merged model, a checkpoint or an adapter, beside control and baselines.

One process, or any number of ranks under srun, torchrun or deepspeed, or tasks of a Slurm array. Run it again to
complete what a kill left open. Without --model it ranks with the baselines alone, from the prepared histories.
"""

import argparse

from trsr_dist.environment import expand_home, prepare_process

prepare_process()

from trsr_dist.cli import cluster_options, config_parser, parse_config, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    example = "python tools/evaluate.py --config configs/quickstart.yaml --model RUN/merged"
    parser = cluster_options(config_parser(__doc__, example))
    parser.add_argument(
        "--model",
        default="",
        type=expand_home,
        metavar="DIR",
        help="merged folder, checkpoint or adapter; without it, the baselines that need no language model",
    )
    parser.add_argument(
        "--output", default="", type=expand_home, metavar="DIR", help="where results go; default RUN/evaluation"
    )
    return parser


def main() -> int:
    args, config = parse_config(build_parser())
    if args.dry_run:
        from trsr_dist.planner.job import dry_run

        return dry_run(config, args, "evaluate")
    if not args.model:
        from trsr_dist.evaluate.job import evaluate_baselines

        return evaluate_baselines(config, args.output)
    from trsr_dist.evaluate.job import evaluate

    return evaluate(config, args.model, output=args.output, force=args.force)


if __name__ == "__main__":
    run_command(main)
