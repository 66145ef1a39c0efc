"""Prepare a run's data: from raw files (data.format) to RUN/histories (items, users, splits, negatives).

One process, or any number of tasks under srun, a Slurm array or torchrun: they share the work through the run folder.
"""

import argparse

from trsr_dist.environment import prepare_process

prepare_process()

from trsr_dist.cli import config_parser, parse_config, run_command  # noqa: E402
from trsr_dist.data.prepare import prepare  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    example = "python tools/prepare_data.py --config configs/mind.yaml data.path=/data/MINDsmall_train"
    return config_parser(__doc__, example)


def main() -> int:
    args, config = parse_config(build_parser())
    return prepare(config, force=args.force, dry_run=args.dry_run)


if __name__ == "__main__":
    run_command(main)
