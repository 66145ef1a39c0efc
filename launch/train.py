"""Train: LoRA under DeepSpeed ZeRO on packed rows with shared prefixes. Run it again to go on where it stopped.

Under deepspeed, torchrun or srun, on any number of ranks, or alone in one process. Exit status 75 means: interrupted,
saved, run it again.
"""

import argparse

from trsr_dist.environment import prepare_process

prepare_process()

from trsr_dist.cli import cluster_options, config_parser, parse_config, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    example = "deepspeed --num_gpus 8 launch/train.py --config configs/mind.yaml train.learning_rate=1e-4"
    return cluster_options(config_parser(__doc__, example))


def main() -> int:
    args, config = parse_config(build_parser())
    if args.dry_run:
        from trsr_dist.planner.job import dry_run

        return dry_run(config, args, "train")
    from trsr_dist.train.job import train

    return train(config, force=args.force)


if __name__ == "__main__":
    run_command(main)
