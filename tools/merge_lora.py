"""Merge a checkpoint or a LoRA adapter into a plain Hugging Face folder, streamed and verified.

DIR of --checkpoint is a run folder (its best checkpoint where the training ranked validation users, else its latest), a
checkpoint folder of any ZeRO stage and world size, a DeepSpeed checkpoint, or a PEFT adapter folder.
"""

from __future__ import annotations

import argparse

from trsr_dist.environment import expand_home, prepare_process

prepare_process()  # before torch is imported

from trsr_dist.cli import command_parser, path, run_command  # noqa: E402
from trsr_dist.log import setup_logging  # noqa: E402

EXAMPLE = "python tools/merge_lora.py --checkpoint runs/quickstart --output runs/quickstart/merged"


def main() -> None:
    """Parse, merge."""
    args = build_parser().parse_args()
    setup_logging(stage="merge")
    from trsr_dist.merge.inputs import MergeOptions
    from trsr_dist.merge.job import merge

    options = vars(args)
    merge(options.pop("checkpoint"), options.pop("output"), MergeOptions(**options))


def build_parser() -> argparse.ArgumentParser:
    """The command line; no config is read, the checkpoint holds all that is needed."""
    parser = command_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--checkpoint", required=True, type=path, metavar="DIR", help="what to merge")
    add("--output", required=True, type=path, metavar="DIR", help="new folder; appears whole or not at all")
    add("--base", type=expand_home, metavar="DIR", help="base model, where the checkpoint names none or it has moved")
    add("--adapter-only", action="store_true", help="write just the PEFT adapter")
    add("--head", choices=["causal", "classifier"], default="causal", help="classifier: one logit, the log-odds of yes")
    add("--dtype", choices=["base", "float32", "bfloat16", "float16"], default="base", help="of the merged weights")
    add("--max-shard-size", type=size, metavar="SIZE", help="such as 5GB or 512MiB; default: the base's files")
    verify = ["auto", "scores", "weights", "none"]
    add("--verify", choices=verify, default="auto", help="auto: scores as memory allows")
    add("--tolerance", type=float, metavar="X", help="largest log-odds difference; default 1e-4 in float32, else 0.1")
    add("--force", action="store_true", help="replace an earlier merge once the new one is whole")
    add("--update", action="store_true", help="the same, only where the checkpoint or a setting has changed since")
    add("--dry-run", action="store_true", help="check the inputs and print the plan; write nothing")
    return parser


def size(text: str) -> int:
    """Bytes of a size such as 5GB, 512MiB or 1000000."""
    units = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    upper = text.upper().strip()
    unit = next((name for name in units if upper.endswith(name)), "")
    number = float(upper.removesuffix(unit)) * units.get(unit, 1)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a size")
    return int(number)


if __name__ == "__main__":
    run_command(main)
