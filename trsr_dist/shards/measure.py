"""Measures token lengths, once per split, tokenizer and prompt style. All ranks measure, each its own shards."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, read_json, write_json
from trsr_dist.log import get_logger, progress
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import TokenizedUser
from trsr_dist.shards.lengths import (
    SUMMARY,
    TRIMS,
    TRIMS_FOR_ALL,
    LengthFacts,
    Lengths,
    length_path,
    lengths_folder,
    sha_part,
)
from trsr_dist.shards.reader import ShardSet

STALL_SECONDS = 3600.0
"""Waiting for the other ranks ends after so long without a new file."""

log = get_logger("shards")


def measure_lengths(
    shards: ShardSet,
    builder: PromptBuilder,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    tolerate: bool = False,
) -> Lengths:
    """The split's lengths, measured first where they are missing. Every rank calls it.

    Args:
        shards: of the split.
        builder: writes the prompts.
        rank: this process; it measures every ``world_size``-th shard.
        world_size: how many processes share the work.
        num_workers: further processes that this one starts; 0: none.
        tolerate: a damaged sample counts as one without candidates, instead of an error.

    Raises:
        DataError: a sample is damaged and ``tolerate`` is off; another rank has stopped measuring.
    """
    folder = lengths_folder(shards, builder)
    if not _is_complete(folder, shards):
        folder.mkdir(exist_ok=True)
        _measure_shards(shards, builder, list(range(rank, len(shards.facts), world_size)), num_workers, tolerate)
        if rank == 0:
            _wait_for(folder, lambda: all(_is_measured(folder, facts) for facts in shards.facts))
            write_json(folder / SUMMARY, asdict(_summarize(folder, shards)))
        else:
            _wait_for(folder, lambda: _is_complete(folder, shards))
    return Lengths(shards, folder)


def _is_measured(folder: Path, facts: dict) -> bool:
    try:
        array = np.load(length_path(folder, facts), mmap_mode="r")
    except FileNotFoundError:
        return False
    return array[0] == facts["num_samples"] and array[1] == sha_part(facts)


def _is_complete(folder: Path, shards: ShardSet) -> bool:
    path = folder / SUMMARY
    return path.is_file() and read_json(path)["shards"] == shards.manifest_hash


def _wait_for(folder: Path, done: Callable[[], bool]) -> None:
    last_count, last_change = -1, time.monotonic()
    while not done():
        count = len(list(folder.iterdir()))
        if count != last_count:
            last_count, last_change = count, time.monotonic()
        elif time.monotonic() - last_change > STALL_SECONDS:
            raise DataError(f"{folder}: no new token lengths for {STALL_SECONDS:.0f} s; see what another rank says")
        time.sleep(0.2)


def _measure_shards(
    shards: ShardSet, builder: PromptBuilder, numbers: list[int], num_workers: int, tolerate: bool
) -> None:
    folder = lengths_folder(shards, builder)
    todo = [number for number in numbers if not _is_measured(folder, shards.facts[number])]
    if not todo:
        return
    log.info("%s: measuring token lengths of %d shards for %s", shards.folder, len(todo), builder.fingerprint)
    if num_workers > 1 and len(todo) > 1:
        context = multiprocessing.get_context("fork")
        arguments = (shards.folder, builder, tolerate)
        with ProcessPoolExecutor(num_workers, context, _start_worker, arguments) as pool:
            for _ in progress(pool.map(_work, todo), total=len(todo), description="token lengths", unit="shard"):
                pass
    else:
        for number in progress(todo, description="token lengths", unit="shard"):
            _measure_shard(shards, builder, number, tolerate)


_worker: list = []


def _start_worker(folder: Path, builder: PromptBuilder, tolerate: bool) -> None:
    _worker[:] = [ShardSet(folder), builder, tolerate]


def _work(number: int) -> None:
    shards, builder, tolerate = _worker
    _measure_shard(shards, builder, number, tolerate)


def _measure_shard(shards: ShardSet, builder: PromptBuilder, number: int, tolerate: bool) -> None:
    facts = shards.facts[number]
    values: list[int] = []
    starts, trims, damaged = [0], Counter(), 0
    for index in range(shards.starts[number], shards.starts[number + 1]):
        try:
            tokenized = builder.build(shards.read(index))
            values += _values(tokenized)
            trims.update(name for name in tokenized.trims if name in TRIMS)
        except DataError as error:
            if not tolerate:
                raise
            log.warning("%s", error)
            damaged += 1
            values.append(0)
        starts.append(len(values))
    header = [facts["num_samples"], sha_part(facts), damaged, *(trims[name] for name in TRIMS)]
    with atomic_file(length_path(lengths_folder(shards, builder), facts), "wb") as stream:
        np.save(stream, np.array([*header, *starts, *values], dtype=np.int32))


def _values(tokenized: TokenizedUser) -> list[int]:
    trimmed = any(name in tokenized.trims for name in TRIMS_FOR_ALL)
    pairs = zip(tokenized.suffixes, tokenized.labels, strict=True)
    return [len(tokenized.prefix) << 1 | trimmed, *(len(suffix) << 1 | int(label > 0) for suffix, label in pairs)]


def _summarize(folder: Path, shards: ShardSet) -> LengthFacts:
    """Facts of the whole split from the shards' files."""
    sums: Counter[str] = Counter()
    trims: Counter[str] = Counter()
    damaged, longest_prompt, longest_unit = [], 0, 0
    lengths = Lengths(shards, folder)
    for number, facts in enumerate(shards.facts):
        header = lengths.header(number)
        table = lengths.table([(int(shards.starts[number]), int(shards.starts[number + 1]))])
        trims.update(dict(zip(TRIMS, header[3:].tolist(), strict=True)))
        sums.update(prefix=int(table.prefixes.sum()), suffix=int(table.suffixes.sum()), candidates=len(table.suffixes))
        sums["damaged"] += int(header[2])
        damaged += [facts["name"]] * bool(header[2])
        if len(table.suffixes):
            longest_prompt = max(longest_prompt, int((table.prefixes[table.owner] + table.suffixes).max()))
            longest_unit = max(longest_unit, int(table.unit_tokens().max()))
    return LengthFacts(
        shards=shards.manifest_hash,
        num_samples=len(shards),
        num_candidates=sums["candidates"],
        prefix_tokens=sums["prefix"],
        suffix_tokens=sums["suffix"],
        longest_prompt=longest_prompt,
        longest_unit=longest_unit,
        trimmed_users=dict(trims),
        num_damaged=sums["damaged"],
        damaged=tuple(damaged),
    )
