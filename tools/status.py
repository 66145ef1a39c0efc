"""Show the progress of a run: users done, speed and ETA of the summarization, last step and ranks of the training."""

from __future__ import annotations

import argparse

from trsr_dist.cli import command_parser, path, run_command
from trsr_dist.log import show
from trsr_dist.status import describe_run

EXAMPLE = "python tools/status.py runs/mind\n  watch -n 10 python tools/status.py runs/mind"


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("run", type=path, metavar="RUN", help="the run folder (run.dir)")
    return parser


def main() -> None:
    """Print what the run folder tells."""
    show(describe_run(build_parser().parse_args().run))


if __name__ == "__main__":
    run_command(main)
