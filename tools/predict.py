"""Rank your own candidates: a user's items, or a ready summary, and any candidates, all as text in JSON lines.

A line of the input: {"id": "u1", "items": ["title: Tea"], "candidates": ["title: Teapot", "title: Tyre"]}, with
"summary" for a ready one. The output has a line for each, with the candidates by falling log-odds of yes. Prompts,
trimming and answers are those of the training; they are kept with the model. With --server a server that has the model
scores (docs/serving.md), the lines are the same, and a call that was cut off goes on where it was.
"""

from __future__ import annotations

from trsr_dist.environment import expand_home, prepare_process

prepare_process()

import argparse  # noqa: E402
from typing import get_args  # noqa: E402

from trsr_dist.cli import command_parser, model_options, path, run_command, server_options, server_settings  # noqa: E402
from trsr_dist.config.sections import EvaluateSection, ModelSection  # noqa: E402
from trsr_dist.files import writing  # noqa: E402
from trsr_dist.log import setup_logging, show  # noqa: E402

ATTENTION = get_args(ModelSection.model_fields["attention"].annotation)
MIN_ROW_TOKENS = EvaluateSection.model_fields["row_tokens"].metadata[0].ge
EXAMPLE = "python tools/predict.py --model runs/quickstart/merged --input requests.jsonl --output ranked.jsonl"


def main() -> None:
    """Check the lines, load the model, rank."""
    args = parse_arguments()
    setup_logging(stage="predict")
    from trsr_dist.predict.lines import check_lines, predict_lines
    from trsr_dist.predict.ranker import Ranker

    if not args.skip_bad_lines:
        check_lines(args.input)
    if args.address:
        ranker = Ranker.connect(server_settings(args), args.model, args.trust_remote_code)
    else:
        here = (args.device, args.precision, args.attention, args.row_tokens)
        ranker = Ranker.open(args.model, *here, args.trust_remote_code)
    with writing(args.output):
        count = predict_lines(ranker, args.input, args.output, args.skip_bad_lines)
    show(f"{args.output}: {count} rankings")


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--model", required=True, type=expand_home, metavar="DIR", help="merged folder, checkpoint or adapter")
    add("--input", required=True, type=path, metavar="FILE", help="JSON lines")
    add("--output", required=True, type=path, metavar="FILE", help="JSON lines; appears whole")
    add("--skip-bad-lines", action="store_true", help="leave bad lines out and name them; else they stop the command")
    add("--attention", default="auto", choices=ATTENTION, help="back end, see model.attention")
    add("--row-tokens", type=int, default=8192, metavar="N", help="length of a packed row; memory grows with it")
    return server_options(model_options(parser))


def parse_arguments() -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args()
    if args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; name a file")
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        parser.error(f"--output {args.output} is the input itself; name another file")
    if args.row_tokens < MIN_ROW_TOKENS:
        parser.error(f"--row-tokens {args.row_tokens}: {MIN_ROW_TOKENS} or more")
    return args


if __name__ == "__main__":
    run_command(main)
