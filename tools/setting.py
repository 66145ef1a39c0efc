"""Print one setting of the merged config, or all of it: for scripts, which thereby read the same values as the jobs."""

from __future__ import annotations

import argparse
import json
from functools import reduce

from trsr_dist.cli import config_parser, parse_config, run_command
from trsr_dist.config import check_key, dump_config


def build_parser() -> argparse.ArgumentParser:
    parser = config_parser(__doc__, "python tools/setting.py --config configs/quickstart.yaml --key run.dir")
    parser.add_argument("--key", metavar="SECTION.NAME", help="the setting to print")
    return parser


def main() -> None:
    """``--key run.dir`` prints that value (JSON where it is no text); without ``--key`` the whole config is printed."""
    args, config = parse_config(build_parser())
    if not args.key:
        print(dump_config(config), end="")
        return
    check_key(args.key)
    value = reduce(getattr, args.key.split("."), config)
    print(value if isinstance(value, str) else json.dumps(value))


if __name__ == "__main__":
    run_command(main)
