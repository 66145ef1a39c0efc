"""Score all candidates and pool items of the train users with a model: a teacher, or what mines hard negatives.

One process, or any number of ranks under srun, torchrun or deepspeed, or tasks of a Slurm array. Run it again to
complete what a kill left open. The scores lie beside the train shards, named by model and shards.
"""

import argparse

from trsr_dist.environment import expand_home, prepare_process

prepare_process()

from trsr_dist.cli import config_parser, parse_config, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    example = "torchrun --nproc_per_node 2 tools/score_shards.py --config configs/quickstart.yaml --model RUN/merged"
    parser = config_parser(__doc__, example)
    help_text = "merged folder, checkpoint or adapter, of this run or of another"
    parser.add_argument("--model", required=True, type=expand_home, metavar="DIR", help=help_text)
    return parser


def main() -> int:
    args, config = parse_config(build_parser())
    from trsr_dist.evaluate.teacher import plan_scoring, score_shards

    if args.dry_run:
        from trsr_dist.config import dump_config
        from trsr_dist.log import show

        show(dump_config(config))
        for job, shards in plan_scoring(config, args.model):
            show(f"scores of {len(shards)} train users: {job.folder}")
        return 0
    return score_shards(config, args.model, args.force)


if __name__ == "__main__":
    run_command(main)
