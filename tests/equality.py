"""Whether two source trees write the same: the whole chain with each of them, and every file compared.

    python -m tests.equality BEFORE_TREE AFTER_TREE --output DIR [--data mind=DIR] [--data amazon_m2=DIR]

Each tree's own commands run in a process each, on one thread, in float32: histories, summaries, shards, a small base,
a few steps of training, merge, evaluation. Settings are those of the first tree's ``configs/``, so that an old config
has to work with the new tree. Both runs of a data set are made under one path, one after the other, and then renamed:
paths in the files are equal. Files are compared byte for byte, JSON by its values without those of ``MEASURED``, which
two runs of one tree do not share either. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

CONFIGS = {"demo": "quickstart.yaml", "mind": "mind.yaml", "amazon_m2": "amazon_m2.yaml"}
SETTINGS = [
    "run.tensorboard=false",
    "demo.num_users=150",
    "demo.num_items=200",
    "data.max_users=300",
    "summarize.engine=extractive",
    "summarize.max_new_tokens=20",
    "summarize.users_per_shard=60",
    "prompt.max_tokens=512",
    "prompt.max_candidate_tokens=48",
    "base.hidden_size=32",
    "base.num_layers=2",
    "base.num_heads=4",
    "base.num_kv_heads=4",
    "base.intermediate_size=64",
    "base.vocab_size=1024",
    "base.steps=3",
    "model.name_or_path=RUN/base",
    "train.max_steps=4",
    "train.row_tokens=2048",
    "train.rows_per_step=2",
    "train.num_workers=0",
    "train.save_every_steps=2",
    "train.log_every_steps=1",
    "train.evaluate_every_steps=2",
    "train.evaluate_users=6",
    "train.precision=float32",
    "evaluate.max_users=8",
    "evaluate.row_tokens=4096",
    "evaluate.protocols=[popularity]",
    "evaluate.baselines=[popularity,recency,bm25,base,control]",
]
MEASURED = {
    "version", "time", "seconds", "started", "host", "pid", "task", "memory_gb", "data_wait_share", "eta_seconds",
    "checkpoint_seconds", "users_per_second", "tokens_per_second", "flops_per_second",
}  # fmt: skip
"""Keys of JSON objects, after the last slash, that no two runs share."""
HOLDERS = ("state.json", "provenance.json", "README.md")
"""Files with such values: their sizes and digests in a manifest are left out, and they are compared themselves."""
UNCOMPARED = ("heartbeats/", "tensorboard/")
MOST_LINES = 20
"""Differences of a file that are listed."""
PROCESS = re.compile(r"-[0-9a-f]{12}(?=\.(?:journal|json)$)")
"""A random number of the process, in names of files."""


def run_chain(tree: Path, config: Path, run: Path, settings: list[str], log: Path) -> None:
    """All stages with the tree's commands, into the new folder ``run``.

    Raises:
        SystemExit: A command failed, or another tree's package would be imported.
    """
    shared = ["--config", str(config), f"run.dir={run}", *SETTINGS, *settings]
    merged = str(run / "merged")
    commands = [
        ["tools/prepare_data.py", *shared],
        ["launch/summarize.py", *shared],
        ["tools/make_tiny_base.py", *shared],
        ["launch/train.py", *shared],
        ["tools/merge_lora.py", "--checkpoint", str(run / "checkpoints/latest"), "--output", merged],
        ["tools/evaluate.py", *shared, "--model", merged],
    ]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    start = partial(subprocess.run, cwd=tree, env=environment, text=True, stderr=subprocess.STDOUT)
    found = start([sys.executable, "-c", "import trsr_dist; print(trsr_dist.__file__)"], stdout=subprocess.PIPE).stdout
    if not found.startswith(f"{tree}/"):
        raise SystemExit(f"{tree}: the package that is imported there is {found.strip()}")
    with log.open("w") as out:
        for command in commands:
            if start([sys.executable, *command], stdout=out).returncode:
                raise SystemExit(f"{tree}: {command[0]} failed, see {log}")


def differences(before: Path, after: Path) -> Iterator[str]:
    """A line for every file or JSON value that one folder has and the other lacks, or has otherwise."""
    ours, theirs = _files(before), _files(after)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield f"{name}: only {'before' if name in ours else 'after'}"
        elif Path(name).suffix in (".json", ".jsonl"):
            values = [_parse(files[name]) for files in (ours, theirs)]
            found = list(_unequal("", *values))
            yield from (f"{name}: {text}" for text in found[:MOST_LINES])
            if len(found) > MOST_LINES:
                yield f"{name}: {len(found) - MOST_LINES} more"
        elif (old := ours[name].read_bytes()) != (new := theirs[name].read_bytes()):
            place = next((i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), None)
            where = "one is the other's beginning" if place is None else f"first at byte {place}"
            yield f"{name}: {len(old)} bytes before, {len(new)} after; {where}"


def _files(folder: Path) -> dict[str, Path]:
    """By name within the folder, without what differs between processes."""
    paths = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    return {PROCESS.sub("", name): path for name, path in paths if not name.startswith(UNCOMPARED)}


def _parse(path: Path) -> object:
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".json":
        return json.loads("\n".join(lines))
    rows = [json.loads(line) for line in lines]
    # Summaries write a row of counts every few seconds.
    return [row for row in rows if row.get("stage") != "summarize"]


def _unequal(where: str, old: object, new: object) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        if [key for key in old if key in new] != [key for key in new if key in old]:
            yield f"{where}: the keys' order"
        for key in [*old, *(key for key in new if key not in old)]:
            if key.rsplit("/", 1)[-1] in MEASURED or (where.endswith("files") and key in HOLDERS):
                continue
            if key not in old or key not in new:
                yield f"{where}.{key}: only {'before' if key in old else 'after'}"
            else:
                yield from _unequal(f"{where}.{key}", old[key], new[key])
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _unequal(f"{where}[{index}]", *pair)
    elif repr(old) != repr(new):
        yield f"{where}: {str(old)[:200]!r} before, {str(new)[:200]!r} after"


def compare_set(trees: dict[str, Path], output: Path, name: str, data: str) -> list[str]:
    """The chain of both trees on one data set, and what differs."""
    folder = output / name
    folder.mkdir(parents=True)
    settings = [f"data.path={data}"] if data else []
    for side, tree in trees.items():
        run_chain(tree, trees["before"] / "configs" / CONFIGS[name], folder / "run", settings, folder / f"{side}.log")
        (folder / "run").rename(folder / side)
    num_files = len(_files(folder / "before"))
    found = [f"{name}/{text}" for text in differences(folder / "before", folder / "after")]
    print(f"{name}: {num_files} files, {len(found)} differences", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE_TREE", help="a checkout, such as one of git worktree add")
    parser.add_argument("after", type=Path, metavar="AFTER_TREE")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder for the runs")
    parser.add_argument("--data", action="append", default=[], metavar="SET=DIR", help="mind or amazon_m2: raw files")
    args = parser.parse_args()
    sets = {"demo": ""} | dict(text.split("=", 1) for text in args.data)
    if unknown := sets.keys() - CONFIGS.keys():
        parser.error(f"--data: unknown data set {', '.join(sorted(unknown))}; known: {', '.join(CONFIGS)}")
    trees = {"before": args.before.resolve(), "after": args.after.resolve()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(partial(compare_set, trees, args.output.resolve()), sets, sets.values()))
    for text in sum(found, []):
        print(text)
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
