"""Reading shards: order, packing and random access against webdataset's own pipeline; cold files; resumption."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import webdataset as wds
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import Row, Timer, rate_row, ratio_row, shared_workload, timed
from trsr_dist.files import sync_path
from trsr_dist.hashing import random_stream
from trsr_dist.planner.flops import Workload, training_flops
from trsr_dist.planner.hardware import hardware
from trsr_dist.planner.shape import ModelShape
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import recommend_instruction
from trsr_dist.records import Candidate, Sample
from trsr_dist.rows import PackedRow
from trsr_dist.shards.codec import decode_sample, encode_sample
from trsr_dist.shards.index import index_path
from trsr_dist.shards.lengths import Lengths, length_path, lengths_folder
from trsr_dist.shards.manifest import ShardFacts, write_split_manifest
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.order import Order
from trsr_dist.shards.packing import deal
from trsr_dist.shards.plan import PackingSettings, TrainPlan, step_specs
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.steps import StepSpec, StreamState
from trsr_dist.shards.stream import TrainStream, advise_ahead
from trsr_dist.shards.writer import write_shard

NUM_SHARDS = 4
"""Written and measured; larger sets are made of links to them."""
SAMPLES_PER_SHARD = 1000
NUM_WORDS = 2000
REPEATS = 3
DECODED = 4000
PIECE = 2**20
SETTINGS = PackingSettings(row_tokens=4096, rows_per_step=8, negatives_per_positive=1, seed=0)
LARGE = 10**8
"""Samples of the order that is only computed."""
MILLION = 10**6
NUM_STEPS = 40
"""Steps that are tokenized."""
RANKS = 8
QWEN_1_5B = ModelShape(1536, 28, 12, 2, 128, 8960, 151936, tied_embeddings=True, qkv_bias=True)
LLAMA_7B = ModelShape(4096, 32, 32, 32, 128, 11008, 32000)
UTILIZATION = 0.5
LORA_RANK, LORA_MODULES = 8, ("q_proj", "k_proj", "v_proj", "o_proj")


def run(scale: float) -> list[Row]:
    """All measurements; ``scale`` multiplies the samples of a shard."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = _write(root / "train", max(300, round(SAMPLES_PER_SHARD * scale)))
        builder = PromptBuilder(_tokenizer(), max_tokens=1024)
        with timed() as measuring:
            measure_lengths(shards, builder)
        case = f"{len(shards)} samples"
        rows = [Row("stream", case, "measure lengths (once)", len(shards) / measuring.cpu, "samples/CPU-s")]
        rows += _warm(_links(root / "warm", shards, builder, 5 * len(shards)), builder)
        rows += _cold(shards, builder)
        rows += _tokens(shards, builder, case)
        rows += _resume(_links(root / "million", shards, builder, round(MILLION * min(1, scale))), builder)
    return rows + _large_order()


def _warm(shards: ShardSet, builder: PromptBuilder) -> list[Row]:
    """Samples per CPU-second of both readers, in turns; the bound is decoding alone, from memory."""
    lengths = measure_lengths(shards, builder)
    readers: dict[str, Callable[[ShardSet, TrainPlan], int]] = {
        "webdataset + json": _read_webdataset,
        "order + pack + read": _read_planned,
    }
    for read in readers.values():
        read(shards, TrainPlan(lengths, SETTINGS))
    seconds = _rounds(readers, shards, lengths, lambda timer: timer.cpu)
    case, bound = f"{len(shards)} samples, warm", _decoding_rate(shards)
    rows = [
        rate_row("stream", case, name, len(shards), times, "samples/CPU-s", bound) for name, times in seconds.items()
    ]
    first, second = seconds.values()
    return [*rows, ratio_row("stream", case, "webdataset / ours", first, second)]


def _cold(shards: ShardSet, builder: PromptBuilder) -> list[Row]:
    """Bytes per second of wall time on files that are not in memory; the bound is reading them from end to end."""
    readers = {
        "end to end, not decoded": _read_bytes,
        "webdataset + json": _read_webdataset,
        "without read-ahead": _read_planned,
        "with read-ahead": _read_advised,
    }
    seconds = _rounds(readers, shards, measure_lengths(shards, builder), lambda timer: timer.wall, _forget)
    size = sum(shards.path(number).stat().st_size for number in range(len(shards.facts))) / 1e6
    case = f"{len(shards)} samples, {size:.0f} MB, cold"
    bound = size / median(seconds["end to end, not decoded"])
    rows = [rate_row("stream", case, name, size, times, "MB/s", bound) for name, times in seconds.items()]
    ratio = ratio_row("stream", case, "webdataset / ours", seconds["webdataset + json"], seconds["with read-ahead"])
    return [*rows, ratio]


def _rounds(
    readers: dict[str, Callable[[ShardSet, TrainPlan], int]],
    shards: ShardSet,
    lengths: Lengths,
    clock: Callable[[Timer], float],
    prepare: Callable[[ShardSet], None] = lambda shards: None,
) -> dict[str, list[float]]:
    """Seconds of every reader, in turns; plans are made each time, since ours are part of the work."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(REPEATS):
        for name, read in readers.items():
            prepare(shards)
            with timed() as timer:
                read(shards, TrainPlan(lengths, SETTINGS))
            seconds[name].append(clock(timer))
    return seconds


def _decoding_rate(shards: ShardSet) -> float:
    """Samples per CPU-second of decoding what a step needs of samples in memory."""
    samples = [encode_sample(shards.read(number)) for number in range(min(len(shards), DECODED))]
    seconds = []
    for _ in range(REPEATS):
        with timed() as timer:
            for data in samples:
                decode_sample(data, (0, 1))
        seconds.append(timer.cpu)
    return len(samples) / median(seconds)


def _read_bytes(shards: ShardSet, plan: TrainPlan) -> int:
    for number in range(len(shards.facts)):
        with open(shards.path(number), "rb") as stream:
            while stream.read(PIECE):
                pass
    return len(shards)


def _read_webdataset(shards: ShardSet, plan: TrainPlan) -> int:
    urls = [str(shards.path(number)) for number in range(len(shards.facts))]
    data = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(8192, seed=0).decode()
    return sum(1 for _ in wds.WebLoader(data, batch_size=None, num_workers=0))


def _read_planned(shards: ShardSet, plan: TrainPlan) -> int:
    return _read(shards, _epoch(plan))


def _read_advised(shards: ShardSet, plan: TrainPlan) -> int:
    return _read(shards, advise_ahead(_epoch(plan), shards))


def _read(shards: ShardSet, specs: Iterator[StepSpec]) -> int:
    """Everything but tokenization."""
    count = 0
    for unit in (unit for spec in specs for row in spec.rows for unit in row):
        shards.read(unit.sample, unit.candidates)
        count += 1
    assert count == len(shards)
    return count


def _epoch(plan: TrainPlan) -> Iterator[StepSpec]:
    for spec in step_specs(plan, StreamState(0, 0, 0, 0, "", "", "", **asdict(SETTINGS)), 0, 1):
        if spec.epoch:
            return
        yield spec


def _forget(shards: ShardSet) -> None:
    """Drop the tars from the page cache."""
    for number in range(len(shards.facts)):
        sync_path(shards.path(number))
        descriptor = os.open(shards.path(number), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _tokens(shards: ShardSet, builder: PromptBuilder, case: str) -> list[Row]:
    """What one worker core delivers, what a GPU takes, how full and how even the rows are."""
    stream = TrainStream(shards, builder, SETTINGS)
    facts = stream.plan.facts(0)
    with timed() as timer:
        rows = [row for step in islice(stream, min(NUM_STEPS, facts.num_steps)) for row in step.rows]
    rate = sum(row.num_tokens for row in rows) / timer.cpu
    found = [
        Row("stream", case, "tokenized, packed rows", rate, "tokens/CPU-s", "one worker core"),
        Row("stream", case, "row fill", facts.fill, "share", f"rows of {SETTINGS.row_tokens} tokens"),
        Row("stream", case, "head", stream.plan.head, "tokens", "held once a row"),
        Row("stream", case, "slowest of 8 ranks", _slowest(stream.plan), "x mean cost", "over an epoch's steps"),
    ]
    for name, shape in (("Qwen2.5-1.5B", QWEN_1_5B), ("Llama-2-7B", LLAMA_7B)):
        taken = _gpu_rate(shape, rows)
        note = f"planner, LoRA r={LORA_RANK}, recomputed, {UTILIZATION:.0%} of the bf16 peak"
        found.append(Row("stream", name, "one H100 takes", taken, "tokens/s", note))
        found.append(Row("stream", name, "worker cores for it", taken / rate, "cores"))
    return found


def _gpu_rate(shape: ModelShape, rows: list[PackedRow]) -> float:
    """Tokens per second of training on these rows, by the planner."""
    users = [unit for row in rows for unit in zip(row.prefix_lengths, row.suffix_lengths, strict=True)]
    counted = sum((shared_workload(*user) for user in users), Workload())
    work = replace(counted, tokens=sum(row.num_tokens for row in rows))
    flops = training_flops(shape, work, shape.num_lora_parameters(LORA_RANK, LORA_MODULES), recompute=True)
    return work.tokens * hardware("h100").flops_per_second * UTILIZATION / flops


def _slowest(plan: TrainPlan) -> float:
    """Cost of the dearest rank over the mean, in steps of four rows a rank, averaged over the steps."""
    costs = [window.cost(row) for window in plan.windows(0) for row in range(window.num_rows)]
    size = 4 * RANKS
    ratios = []
    for first in range(0, len(costs) - size + 1, size):
        sums = [sum(costs[first + row] for row in hand) for hand in deal(costs[first : first + size], RANKS)]
        ratios.append(max(sums) / np.mean(sums))
    return float(np.mean(ratios))


def _resume(shards: ShardSet, builder: PromptBuilder) -> list[Row]:
    """From nothing open to the first step after 90 % of an epoch, and the exact count of its steps."""
    measure_lengths(shards, builder)
    case = f"{len(shards)} samples in {len(shards.facts)} shards"
    plan = TrainStream(shards, builder, SETTINGS).plan
    window = plan.order.num_windows * 9 // 10
    start = next(iter(TrainStream(shards, builder, SETTINGS))).state
    state = StreamState.from_dict(start.to_dict() | {"window": window, "row": 0})
    with timed() as first:
        next(iter(TrainStream(ShardSet(shards.folder), builder, SETTINGS, state=state)))
    with timed() as counting:
        plan.facts(0)
    return [
        Row("stream", case, "first step after 90 %", first.wall, "s", "opening everything, imports not counted"),
        Row("stream", case, "count of an epoch's steps (once)", counting.cpu, "CPU-s"),
    ]


def _large_order() -> list[Row]:
    with timed() as timer:
        order = Order(LARGE, 256, 0)
        order.runs(0, order.num_windows * 9 // 10)
    positions = np.arange(order.num_windows)[:100]
    with timed() as many:
        for window in positions.tolist():
            order.runs(1, window)
    per_sample = many.cpu / (len(positions) * 256 * 32)
    return [
        Row("stream", "10^8 samples", "a window at 90 %", timer.wall, "s"),
        Row("stream", "10^8 samples", "order", per_sample * 1e9, "ns/sample"),
    ]


def _write(folder: Path, samples_per_shard: int) -> ShardSet:
    starts = range(0, NUM_SHARDS * samples_per_shard, samples_per_shard)
    facts = [
        write_shard(folder / f"train-{start:06d}.tar", map(_sample, range(start, start + samples_per_shard)))
        for start in starts
    ]
    write_split_manifest(folder, facts, {}, {})
    return ShardSet(folder)


def _links(folder: Path, shards: ShardSet, builder: PromptBuilder, num_samples: int) -> ShardSet:
    """A larger split whose shards are links to those of a measured one."""
    folder.mkdir()
    facts = []
    for number in range(-(-num_samples // shards.facts[0]["num_samples"])):
        source = shards.facts[number % len(shards.facts)]
        target = ShardFacts(**(source | {"name": f"train-{number:06d}.tar"}))
        os.link(shards.folder / source["name"], folder / target.name)
        os.link(index_path(shards.folder / source["name"]), index_path(folder / target.name))
        facts.append(target)
    write_split_manifest(folder, facts, {}, {})
    linked = ShardSet(folder)
    lengths_folder(linked, builder).mkdir()
    for number, target in enumerate(linked.facts):
        source = length_path(lengths_folder(shards, builder), shards.facts[number % len(shards.facts)])
        os.link(source, length_path(lengths_folder(linked, builder), target))
    return linked


def _sample(number: int) -> Sample:
    """The size of a MIND user: a summary, five recent items, one positive and a pool of 20."""
    random = random_stream("benchmark", number)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{random.randrange(NUM_WORDS)}" for _ in range(random.randint(low, high)))

    candidates = tuple(Candidate(f"N{number}{i}", f"title: {text(6, 14)}", int(i == 0)) for i in range(21))
    recent = tuple(f"title: {text(6, 14)}" for _ in range(5))
    return Sample(f"U{number}", recommend_instruction("news"), text(40, 120), recent, candidates, {})


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE made here; each of the words becomes one or two tokens, as common words do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    texts = [recommend_instruction("news") + " yes no"] * 5 + [f" w{number} title:" for number in range(NUM_WORDS)]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)
