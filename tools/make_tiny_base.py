"""Make a small base model and its tokenizer from a run's train texts, for machines without weights: RUN/base."""

import argparse

from trsr_dist.environment import prepare_process

prepare_process()

from trsr_dist.cli import config_parser, parse_config, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    return config_parser(__doc__, "python tools/make_tiny_base.py --config configs/quickstart.yaml")


def main() -> int:
    args, config = parse_config(build_parser())
    from trsr_dist.base.job import make_base

    return make_base(config, force=args.force, dry_run=args.dry_run)


if __name__ == "__main__":
    run_command(main)
