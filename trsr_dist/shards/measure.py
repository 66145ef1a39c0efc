"""Measures the token lengths of a split, once: they are kept beside the shards.

The tasks that write shards do it where the tokenizer is there, or all ranks of a training, each its own shards.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from trsr_dist.environment import cores_of_a_rank, die_with_parent
from trsr_dist.errors import DataError
from trsr_dist.files import read_json, write_json
from trsr_dist.log import get_logger, progress
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import TokenizedUser
from trsr_dist.rows import common_prefix_length
from trsr_dist.shards.lengths import (
    SUMMARY,
    TRIMS,
    TRIMS_FOR_ALL,
    Header,
    LengthFacts,
    Lengths,
    is_measured,
    lengths_folder,
    wait_for,
    write_lengths,
)
from trsr_dist.shards.reader import ShardSet, UnreadableError

MANY_SAMPLES = 4000
"""From this number on a rank measures with all cores that are its share of the node: the GPUs wait for it."""

log = get_logger("shards")


@dataclass(frozen=True, slots=True)
class Share:
    """This process among those that share the work on a split."""

    rank: int = 0
    """It measures every ``world_size``-th shard."""
    world_size: int = 1
    num_workers: int = 0
    """Processes that this one starts at least; 0: none unless there is much to measure."""


ALONE = Share()


def measure_lengths(shards: ShardSet, builder: PromptBuilder, share: Share = ALONE, tolerate: bool = False) -> Lengths:
    """The split's lengths, measured first where they are missing. Every rank calls it.

    Args:
        shards: of the split.
        builder: writes the prompts.
        share: of this process.
        tolerate: a damaged sample counts as one without candidates, instead of an error.

    Raises:
        DataError: a sample is damaged and ``tolerate`` is off; another rank has stopped measuring.
    """
    folder = lengths_folder(shards, builder)
    if not _is_complete(folder, shards, tolerate):
        measuring = measure_share(shards, builder, share, tolerate)
        if share.rank == 0:
            wait_for(folder, measuring.all_done(deque(range(len(shards.facts)))))
            write_json(folder / SUMMARY, asdict(_summarize(folder, shards)))
        else:
            wait_for(folder, lambda: _is_complete(folder, shards, tolerate))
    return Lengths(shards, folder)


def measure_share(shards: ShardSet, builder: PromptBuilder, share: Share, tolerate: bool = False) -> Measuring:
    """Measure this process's shards where that is missing, and wait for no other; arguments as ``measure_lengths``."""
    folder = lengths_folder(shards, builder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be made ({error.strerror}); token lengths are kept beside the shards, so let this "
            "user write there"
        ) from None
    measuring = Measuring(shards, builder, folder, tolerate)
    _measure_shards(measuring, list(range(share.rank, len(shards.facts), share.world_size)), share.num_workers)
    return measuring


def _is_complete(folder: Path, shards: ShardSet, tolerate: bool) -> bool:
    """Whether the whole split is measured; damaged samples are looked at again where none is tolerated."""
    path = folder / SUMMARY
    if not path.is_file():
        return False
    value = read_json(path)
    names = {field.name for field in fields(LengthFacts)}
    return value.keys() == names and value["shards"] == shards.manifest_hash and (tolerate or not value["num_damaged"])


@dataclass(frozen=True, slots=True)
class Measuring:
    """Measures shards of one split."""

    shards: ShardSet
    builder: PromptBuilder
    folder: Path
    tolerate: bool

    def is_done(self, number: int) -> bool:
        """Whether a shard needs no measuring."""
        if not is_measured(self.folder, self.shards.facts[number]):
            return False
        return self.tolerate or not Lengths(self.shards, self.folder).header(number).num_damaged

    def all_done(self, waiting: deque[int]) -> Callable[[], bool]:
        """Whether no shard of ``waiting`` needs measuring; those found done are not looked at again."""

        def check() -> bool:
            while waiting and self.is_done(waiting[0]):
                waiting.popleft()
            return not waiting

        return check

    def first_prefix(self) -> tuple[int, ...]:
        """Prefix of the split's first readable sample; the other prefixes are compared with it."""
        for index in range(len(self.shards)):
            tokenized = self.tokenize(index)
            if tokenized is not None:
                return tokenized.prefix
        return ()

    def tokenize(self, index: int) -> TokenizedUser | None:
        """A sample's prompts; None where it is damaged and that is tolerated."""
        try:
            return self.builder.build(self.shards.read(index))
        except DataError as error:
            if not self.tolerate or isinstance(error, UnreadableError):  # lengths are kept for good
                raise
            log.warning("%s", error)
            return None

    def measure(self, number: int, first: tuple[int, ...]) -> None:
        """Write the file of one shard."""
        facts = self.shards.facts[number]
        values: list[int] = []
        starts, trims, damaged, head = [0], Counter(), 0, len(first)
        for index in range(self.shards.starts[number], self.shards.starts[number + 1]):
            tokenized = self.tokenize(index)
            if tokenized is None:
                damaged += 1
                values.append(0)
            else:
                values += _values(tokenized)
                # -1, which is no token, lets the whole of the first prefix be shared
                head = common_prefix_length((tokenized.prefix, (*first[:head], -1)))
                trims.update(name for name in tokenized.trims if name in TRIMS)
            starts.append(len(values))
        header = Header(damaged, head, {name: trims[name] for name in TRIMS})
        write_lengths(self.folder, facts, header, starts, values)


def _measure_shards(measuring: Measuring, numbers: list[int], num_workers: int) -> None:
    todo = [number for number in numbers if not measuring.is_done(number)]
    if not todo:
        return
    shards = measuring.shards
    log.info("%s: measuring token lengths of %d shards", shards.folder, len(todo))
    first = measuring.first_prefix()
    num_samples = sum(shards.facts[number]["num_samples"] for number in todo)
    num_processes = min(len(todo), max(num_workers, cores_of_a_rank()) if num_samples >= MANY_SAMPLES else num_workers)
    if num_processes > 1:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(num_processes, context, _start_worker, (measuring, first)) as pool:
            for _ in progress(pool.map(_work, todo), total=len(todo), description="token lengths", unit="shard"):
                pass
    else:
        for number in progress(todo, description="token lengths", unit="shard"):
            measuring.measure(number, first)


_worker: list = []


def prepare_worker() -> None:
    """Call first in a worker process. Slurm signals every process of a job step; what to do is decided by the process
    that has started the workers alone.

    A worker whose parent was killed would wait for ever for a reader of its pipe.
    """
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _start_worker(measuring: Measuring, first: tuple[int, ...]) -> None:
    prepare_worker()
    _worker[:] = [replace(measuring, shards=measuring.shards.opened_again()), first]


def _work(number: int) -> None:
    measuring, first = _worker
    measuring.measure(number, first)


def _values(tokenized: TokenizedUser) -> list[int]:
    trimmed = any(name in tokenized.trims for name in TRIMS_FOR_ALL)
    pairs = zip(tokenized.suffixes, tokenized.labels, strict=True)
    return [len(tokenized.prefix) << 1 | trimmed, *(len(suffix) << 1 | int(label > 0) for suffix, label in pairs)]


def _summarize(folder: Path, shards: ShardSet) -> LengthFacts:
    """Facts of the whole split from the shards' files."""
    sums: Counter[str] = Counter()
    trims: Counter[str] = Counter()
    damaged, heads, longest_prompt, longest_unit = [], [], 0, 0
    lengths = Lengths(shards, folder)
    for number, facts in enumerate(shards.facts):
        header = lengths.header(number)
        table = lengths.table([(int(shards.starts[number]), int(shards.starts[number + 1]))])
        trims.update(header.trimmed_users)
        sums.update(prefix=int(table.prefixes.sum()), suffix=int(table.suffixes.sum()), candidates=len(table.suffixes))
        sums["damaged"] += header.num_damaged
        damaged += [facts["name"]] * bool(header.num_damaged)
        heads += [header.head_tokens] * (header.num_damaged < facts["num_samples"])
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
        head_tokens=min(heads, default=0),
        trimmed_users=dict(trims),
        num_damaged=sums["damaged"],
        damaged=tuple(damaged),
    )
