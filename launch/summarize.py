"""Summarize every user's history and write the training shards. Run it again to complete what is missing.

One process, or any number of tasks under srun, a Slurm array or torchrun: they share the work through the run folder.
"""

from trsr_dist.environment import prepare_process

prepare_process()

from trsr_dist.cli import config_parser, parse_config, run_command  # noqa: E402


def main() -> int:
    args, config = parse_config(config_parser(__doc__, "python launch/summarize.py --config configs/quickstart.yaml"))
    from trsr_dist.summarize.job import summarize

    return summarize(config, force=args.force, dry_run=args.dry_run)


if __name__ == "__main__":
    run_command(main)
