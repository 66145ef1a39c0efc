"""What every command shares: ``--config``, ``key=value``, ``--dry-run``, ``--force``, exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from trsr_dist.config import Config, load_config
from trsr_dist.environment import expand_home
from trsr_dist.errors import TrsrError
from trsr_dist.files import explain
from trsr_dist.printable import printable
from trsr_dist.records import ServerSettings

EXIT_ERROR = 1
EXIT_REQUEUE = 75
"""EX_TEMPFAIL: the work was checkpointed and asks to be run again."""


def command_parser(description: str, example: str, allow_abbrev: bool = True) -> argparse.ArgumentParser:
    """Parser of a command, whose help ends with an example."""
    epilog, form = f"example:\n  {example}", argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=form, allow_abbrev=allow_abbrev
    )


def config_parser(description: str, example: str) -> argparse.ArgumentParser:
    """Parser of a command that reads a run's config."""
    parser = command_parser(description, example, allow_abbrev=False)  # job scripts look for --force
    parser.add_argument("--config", required=True, type=path, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the merged config and the plan; touch nothing")
    parser.add_argument("--force", action="store_true", help="redo a finished stage")
    # The deepspeed launcher appends --local_rank; the rank itself is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a setting of the file")
    return parser


def cluster_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what a forecast is made for."""
    from trsr_dist.planner.cost import RESTART_SECONDS, SAVE_SECONDS
    from trsr_dist.planner.hardware import CATALOGUE

    add = parser.add_argument_group("the cluster of the forecast").add_argument
    described = "flops=400e12,memory=96e9,bandwidth=4e12,node=300e9,network=50e9"
    names = f"{', '.join(CATALOGUE)}, here (this machine, measured), or a description: {described}"
    add("--hardware", default="h100", metavar="H", help=f"device: {names} (default: %(default)s)")
    add("--nodes", type=positive, default=1, metavar="N", help="default: %(default)s")
    add("--devices-per-node", type=positive, default=8, metavar="N", help="default: %(default)s")
    add("--mfu", type=float, metavar="X", help="share of the peak that is reached (default: as usual on that hardware)")
    add("--price", type=float, default=0.0, metavar="X", help="of one device for an hour")
    pause, restart = "pause of a checkpoint (default: %(default)s)", "failure to next step (default: %(default)s)"
    add("--save-seconds", type=float, default=SAVE_SECONDS, metavar="S", help=pause)
    add("--restart-seconds", type=float, default=RESTART_SECONDS, metavar="S", help=restart)
    return parser


def model_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add where and how a model is run by this process."""
    add = parser.add_argument
    add("--device", default="auto", help="of the model here: cpu, cuda:1, ...; default: a GPU where there is one")
    add("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights here")
    add("--trust-remote-code", action="store_true", help="run model code from the hub")
    return parser


def server_options(parser: argparse.ArgumentParser, required: bool = False) -> argparse.ArgumentParser:
    """Add a server's address and how it is asked, by the names and defaults of ``ServerSettings``."""
    parser.set_defaults(**asdict(ServerSettings("")))
    add = parser.add_argument_group("the server (its key, if any: OPENAI_API_KEY)").add_argument
    add("--server", dest="address", required=required, metavar="URL", help="such as http://host:8000")
    add("--served-model", metavar="NAME", help="the server's name of the model; default: its only one")
    protocols = "completions, classify or auto: the one that the server has (default: %(default)s)"
    add("--protocol", choices=("auto", "completions", "classify"), help=protocols)
    add("--max-in-flight", type=positive, metavar="N", help="requests at a time (default: %(default)s)")
    add("--timeout-seconds", type=positive, metavar="S", help="of one try (default: %(default)s)")
    add("--max-retries", type=positive, metavar="N", help="of one request (default: %(default)s)")
    top = "tokens that a server without logprob_token_ids is asked for (default: %(default)s)"
    add("--top-logprobs", type=positive, metavar="N", help=top)
    return parser


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """Those of ``server_options``."""
    return ServerSettings(**{name: getattr(args, name) for name in asdict(ServerSettings(""))})


def positive(text: str) -> int:
    """The type of an argument that counts something.

    Raises:
        argparse.ArgumentTypeError: it is no whole number, or below 1.
    """
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def path(text: str) -> Path:
    """The type of an argument that names a file or folder."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_config(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Arguments and merged config; the overrides may stand before or after the options."""
    from trsr_dist.summarize.plans import planner

    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    planner(config.summarize.scheme)  # a wrong one is told before the first stage is paid for
    return args, config


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command and leave with its status; an error that a user can fix is printed without a traceback.

    So is whatever the system says of a file; other exceptions are faults of the program and stay visible.
    """
    try:
        status = command() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_ERROR
    except (TrsrError, OSError) as error:
        message = explain(error) if isinstance(error, OSError) else error
        if not isinstance(message, TrsrError):
            raise
        print(printable(f"error: {message}", sys.stderr.encoding), file=sys.stderr, flush=True)
        status = EXIT_ERROR
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
