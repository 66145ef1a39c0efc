"""Summarize every user's history and write the training shards. Run it again to complete what is missing.

One process, or any number of tasks under srun, a Slurm array or torchrun: they share the work through the run folder.
"""

import argparse

from trsr_dist.environment import prepare_process

prepare_process()

from trsr_dist.cli import cluster_options, config_parser, parse_config, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    example = "python launch/summarize.py --config configs/quickstart.yaml"
    return cluster_options(config_parser(__doc__, example))


def main() -> int:
    args, config = parse_config(build_parser())
    if args.dry_run:
        from trsr_dist.planner.job import dry_run

        return dry_run(config, args, "summarize")
    from trsr_dist.summarize.job import summarize

    return summarize(config, force=args.force)


if __name__ == "__main__":
    run_command(main)
