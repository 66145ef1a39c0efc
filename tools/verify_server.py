"""Check that a server gives the scores of the trained model: real prompts are scored there and here, as token ids, as
text and as chat messages. Prints the differences and, where it can be told, what is wrong.

Exit status: 0 where all is within the tolerance, 1 else.
"""

from __future__ import annotations

from trsr_dist.environment import expand_home, prepare_process

prepare_process()

import argparse  # noqa: E402

from trsr_dist.cli import (  # noqa: E402
    command_parser,
    model_options,
    path,
    positive,
    run_command,
    server_options,
    server_settings,
)
from trsr_dist.files import write_json  # noqa: E402
from trsr_dist.log import setup_logging, show  # noqa: E402
from trsr_dist.records import ROUTES  # noqa: E402

EXAMPLE = "python tools/verify_server.py --model runs/quickstart/merged --server http://localhost:8000"


def main() -> int:
    """Load the model, ask the server, compare."""
    args = build_parser().parse_args()
    setup_logging(stage="verify")
    from trsr_dist.predict.diagnosis import Local
    from trsr_dist.predict.server import ScoreServer
    from trsr_dist.predict.verify import default_tolerance, find_samples, verify

    local = Local.open(args.model, args.device, args.precision, trust_remote_code=args.trust_remote_code)
    server = ScoreServer(server_settings(args), local.prompts.builder)
    domain = local.prompts.provenance.get("domain", "items")
    samples, origin = find_samples(args.model, args.shards, args.num_users, domain)
    tolerance = default_tolerance(local) if args.tolerance is None else args.tolerance
    found = verify(local, server, samples, origin, args.routes, tolerance)
    if args.json:
        write_json(args.json, found.report())
    show("\n".join(found.lines()))
    return 0 if found.is_equal else 1


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--model", required=True, type=expand_home, metavar="DIR", help="merged folder, checkpoint or adapter")
    add("--shards", type=path, metavar="DIR", help="of a split; default: the run's valid or test users, else built-in")
    add("--num-users", type=positive, default=32, metavar="N", help="default: %(default)s")
    routes = "; ".join(f"{name}: {what}" for name, what in ROUTES.items())
    add("--routes", nargs="+", choices=tuple(ROUTES), default=list(ROUTES), metavar="ROUTE", help=routes)
    add("--tolerance", type=float, metavar="X", help="of log-odds; default: 0.001 in float32, 0.25 in 16 bits")
    add("--json", type=path, metavar="FILE", help="write the figures there too")
    return server_options(model_options(parser), required=True)


if __name__ == "__main__":
    run_command(main)
