"""Run the whole method on built-in data, without GPU, model or data set. Run it again to go on where it stopped.

Prepare, summarize, pre-train a small base, train, merge, evaluate; training and evaluation on several ranks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from trsr_dist.cli import path, positive, run_command
from trsr_dist.environment import ranks_that_fit

ROOT = Path(__file__).parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=path, metavar="DIR", help="run folder; default: runs/quickstart, or -SEED")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other data, base and training")
    ranks = "of training and evaluation; default: 2, or 1 on a machine with one GPU"
    parser.add_argument("--ranks", type=positive, metavar="N", help=ranks)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of quickstart.yaml")
    return parser


def main() -> int:
    """One stage after the other, until one fails."""
    args = build_parser().parse_intermixed_args()
    run = args.run or Path(f"runs/quickstart-{args.seed}" if args.seed else "runs/quickstart")
    settings = [f"run.dir={json.dumps(str(run))}", f"run.seed={args.seed}", *args.overrides]
    num_ranks = args.ranks or ranks_that_fit(2)
    return next((status for c in commands(run, settings, num_ranks) if (status := subprocess.call(c))), 0)


def commands(run: Path, settings: list[str], num_ranks: int) -> Iterator[list[str]]:
    """The stages' command lines."""
    here = [sys.executable]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    ranks = ["env", "OMP_NUM_THREADS=1", sys.executable, *launcher]
    config = ["--config", f"{ROOT}/configs/quickstart.yaml", *settings]
    yield [*here, f"{ROOT}/tools/prepare_data.py", *config]
    yield [*here, f"{ROOT}/launch/summarize.py", *config]
    yield [*here, f"{ROOT}/tools/make_tiny_base.py", *config]
    yield [*ranks, f"{ROOT}/launch/train.py", *config]
    yield [*here, f"{ROOT}/tools/merge_lora.py", "--checkpoint", str(run), "--output", f"{run}/merged"]
    yield [*ranks, f"{ROOT}/tools/evaluate.py", *config, "--model", f"{run}/merged"]


if __name__ == "__main__":
    run_command(main)
