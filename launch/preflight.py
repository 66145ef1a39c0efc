"""Check every node of a job before it starts: run folder, code, packages, disk, GPUs, network. One task per rank.

The sbatch files run it under srun; the exit status is 0 when all is well, and each fault is one line with its node.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trsr_dist.environment import prepare_process

prepare_process()  # before torch is imported

from trsr_dist.cli import EXIT_ERROR, command_parser, path, run_command  # noqa: E402
from trsr_dist.environment import detect_ranks  # noqa: E402
from trsr_dist.log import get_logger, setup_logging  # noqa: E402
from trsr_dist.preflight import PreflightOptions, check_all, report_faults  # noqa: E402

EXAMPLE = "srun python launch/preflight.py --run runs/mind --reports runs/mind/logs/check --hosts node1,node2"


def main() -> int:
    """Nodes first, network after."""
    args = build_parser().parse_args()
    ranks = detect_ranks()
    setup_logging(ranks.rank, "preflight")
    options = PreflightOptions(
        args.run, args.reports, args.scratch, args.hosts.split(","), args.free_gb, args.timeout_seconds
    )
    faults, summary = check_all(ranks, options, network=not args.no_network)
    if faults:
        report_faults(ranks, faults, args.bad_nodes)
        return EXIT_ERROR
    get_logger("preflight").info("%s", summary)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """No config is read: the job's script passes what it knows."""
    parser = command_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--run", required=True, type=path, metavar="DIR", help="the run folder")
    add("--reports", required=True, type=path, metavar="DIR", help="new folder in which the ranks of this start meet")
    add("--hosts", required=True, metavar="A,B", help="the job's nodes, rank 0's first")
    add("--bad-nodes", type=path, default=Path("bad-nodes"), metavar="FILE", help="where bad nodes are named")
    add("--scratch", type=path, default=Path("/tmp"), metavar="DIR", help="folder on each node's own disk")
    add("--free-gb", type=float, default=5, metavar="GB", help="free space needed in both folders")
    add("--timeout-seconds", type=float, default=60, metavar="S", help="limit of each wait for other ranks")
    add("--no-network", action="store_true", help="skip the all-reduce: the stage needs no collectives")
    return parser


if __name__ == "__main__":
    run_command(main)
