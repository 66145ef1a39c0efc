"""Look into shards: counts, lengths, label balance, duplicates, leaks, shortcuts, damage.

Token lengths are measured beside the shards where they are missing. Status 1: something is wrong; warnings leave it 0.

example: python tools/inspect_shards.py runs/quickstart/shards --config configs/quickstart.yaml --verify
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trsr_dist.environment import expand_home, prepare_process

prepare_process()

from trsr_dist.cli import path, run_command  # noqa: E402
from trsr_dist.config import Config, load_config  # noqa: E402
from trsr_dist.data.store import HistoryStore  # noqa: E402
from trsr_dist.log import setup_logging  # noqa: E402
from trsr_dist.prompts.builder import PromptBuilder  # noqa: E402
from trsr_dist.run import RunFolder, beside, read_manifest  # noqa: E402
from trsr_dist.shards.inspect.content import ItemFacts  # noqa: E402
from trsr_dist.shards.inspect.job import Options, Tokens, inspect_shards  # noqa: E402
from trsr_dist.shards.plan import PackingSettings  # noqa: E402


def main() -> int:
    """Parse, look, print."""
    parser = build_parser()
    args = parser.parse_intermixed_args()
    if args.overrides and not args.config:
        parser.error(f"{args.overrides[0]}: an override changes a config; give --config FILE")
    setup_logging(stage="inspect")
    config = load_config(args.config, args.overrides) if args.config else Config(data={"format": "demo"})
    lessons = args.lessons or beside(args.dir, "samples/chosen")
    options = Options(args.index, args.verify, args.samples, make_tokens(args, config), item_facts(args.dir), lessons)
    return inspect_shards(args.dir, options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dir", type=path, metavar="DIR", help="RUN/shards, or the folder of one split")
    add("--config", type=path, metavar="FILE", help="of the run: its tokenizer, prompt and row settings are used")
    add("--tokenizer", type=expand_home, metavar="DIR", help="model folder or hub id, in place of the config's")
    add("--verify", action="store_true", help="check every byte")
    add("--index", action="store_true", help="first build missing indexes, and the manifest of tars from elsewhere")
    add("--samples", type=int, default=1, metavar="N", help="samples to show of each split (default: 1)")
    add("--workers", type=int, default=0, metavar="N", help="processes that measure token lengths")
    lessons = "of tools/choose_summaries.py, by which the summarizer was tuned (default: the run's own)"
    add("--lessons", type=path, metavar="DIR", help=lessons)
    add("overrides", nargs="*", metavar="key=value", help="override a setting of the config")
    return parser


def make_tokens(args: argparse.Namespace, config: Config) -> Tokens | None:
    """The tokenizer and settings of the run; None where none was named."""
    name = args.tokenizer or (args.config and RunFolder(Path(config.run.dir)).resolve(config.model.name_or_path))
    if not name:
        return None
    from trsr_dist.pretrained import BaseSource, load_tokenizer

    tokenizer = load_tokenizer(BaseSource(name, config.model.revision, config.model.trust_remote_code))
    train = config.train
    packing = PackingSettings(train.row_tokens, train.rows_per_step, train.negatives_per_positive, config.run.seed)
    return Tokens(PromptBuilder(tokenizer, **config.prompt.model_dump()), packing, args.workers)


def item_facts(folder: Path) -> ItemFacts | None:
    """Popularity and time of the items, where the run's histories lie beside the shards."""
    found = beside(folder, "histories")
    if found is None:
        return None
    by_clicks = read_manifest(found).get("settings", {}).get("candidates") in ("popularity", "targets")
    return ItemFacts(HistoryStore(found).catalogue.numbers(), by_clicks)


if __name__ == "__main__":
    run_command(main)
