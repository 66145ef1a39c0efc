"""Prepare a run's data: from raw MIND, Amazon-M2 or JSONL files to RUN/histories (items, users, splits, negatives)."""

from trsr_dist.environment import prepare_process

prepare_process()

from trsr_dist.cli import config_parser, parse_config, run_command  # noqa: E402
from trsr_dist.data.prepare import prepare  # noqa: E402


def main() -> int:
    example = "python tools/prepare_data.py --config configs/mind.yaml data.path=/data/MINDsmall_train"
    args, config = parse_config(config_parser(__doc__, example))
    return prepare(config, force=args.force, dry_run=args.dry_run)


if __name__ == "__main__":
    run_command(main)
