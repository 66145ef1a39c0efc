"""Push a merged model, a classifier or an adapter to the Hugging Face hub, with its card.

DIR is a folder of tools/merge_lora.py (--adapter-only for an adapter). A new repository is private unless --public is
given. The token is that of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse

from trsr_dist.environment import prepare_process

prepare_process()

from trsr_dist.cli import command_parser, path, run_command  # noqa: E402
from trsr_dist.log import setup_logging  # noqa: E402

EXAMPLE = "python tools/push.py --model runs/mind/merged --repo me/mind-ranker --dry-run"


def main() -> None:
    """Parse, push."""
    args = build_parser().parse_args()
    setup_logging(stage="push")
    from huggingface_hub import HfApi

    from trsr_dist.merge.push import PushOptions, push

    push(args.model, PushOptions(args.repo, args.evaluation, args.base_model, args.public, args.dry_run), HfApi())


def build_parser() -> argparse.ArgumentParser:
    """The command line; the folder holds all else."""
    parser = command_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--model", required=True, type=path, metavar="DIR", help="what to push")
    add("--repo", required=True, metavar="OWNER/NAME", help="repository on the hub; made where it is missing")
    add("--evaluation", type=path, metavar="FILE", help="results for the card; default: RUN/evaluation/test.json")
    add("--base-model", default="", metavar="ID", help="the base's hub id, where the model knows only a path")
    add("--public", action="store_true", help="a new repository that all can see")
    add("--dry-run", action="store_true", help="print the card and the files; send nothing")
    return parser


if __name__ == "__main__":
    run_command(main)
