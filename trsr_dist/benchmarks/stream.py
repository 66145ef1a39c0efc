"""Reading shards: the stream's order, packing and random access against webdataset's own pipeline, in one run."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset as wds
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trsr_dist.benchmarks.common import Row, timed
from trsr_dist.hashing import random_stream
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.wording import recommend_instruction
from trsr_dist.records import Candidate, Sample
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.order import Order
from trsr_dist.shards.plan import PackingSettings, TrainPlan
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.steps import StreamState, step_specs
from trsr_dist.shards.stream import TrainStream
from trsr_dist.shards.writer import write_shard, write_split_manifest

NUM_SAMPLES = 20_000
SAMPLES_PER_SHARD = 1000
NUM_WORDS = 2000
SETTINGS = PackingSettings(row_tokens=4096, rows_per_step=8, negatives_per_positive=1, seed=0)
LARGE = 10**8
"""Samples of the order that is only reckoned with."""


def run(scale: float) -> list[Row]:
    """Samples per CPU-second of both readers, tokens per CPU-second of the whole stream, the order at 10^8."""
    with tempfile.TemporaryDirectory() as folder:
        shards = _write(Path(folder) / "train", max(2000, round(NUM_SAMPLES * scale)))
        builder = PromptBuilder(_tokenizer(), max_tokens=1024)
        with timed() as measuring:
            lengths = measure_lengths(shards, builder)
        case = f"{len(shards)} samples"
        plan = TrainPlan(lengths, SETTINGS)
        per_second = {"measure lengths (once)": len(shards) / measuring.cpu}
        for reader in (_webdataset, _planned, _webdataset, _planned):  # interleaved; the second pass counts
            name, rate = reader(shards, plan)
            per_second[name] = rate
        rows = [Row("stream", case, name, rate, "samples/CPU-s") for name, rate in per_second.items()]
        ratio = per_second["order + pack + read"] / per_second["webdataset + json"]
        rows.append(Row("stream", case, "ratio to webdataset", ratio, "x"))
        return rows + _end_to_end(shards, builder, case) + _large_order()


def _webdataset(shards: ShardSet, plan: TrainPlan) -> tuple[str, float]:
    urls = [str(shards.path(number)) for number in range(len(shards.facts))]
    data = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(8192, seed=0).decode()
    with timed() as timer:
        count = sum(1 for _ in wds.WebLoader(data, batch_size=None, num_workers=0))
    assert count == len(shards)
    return "webdataset + json", count / timer.cpu


def _planned(shards: ShardSet, plan: TrainPlan) -> tuple[str, float]:
    """Everything but tokenization; the plan of the epoch is made anew."""
    fresh = TrainPlan(plan.lengths, plan.settings)
    start = StreamState(0, 0, 0, 0, "", "", "", 0, SETTINGS.rows_per_step, 0, 0)
    count = 0
    with timed() as timer:
        for spec in step_specs(fresh, start, 0, 1):
            if spec.epoch:
                break
            for unit in (unit for row in spec.rows for unit in row):
                shards.read(unit.sample, unit.candidates)
                count += 1
    assert count == len(shards)
    return "order + pack + read", count / timer.cpu


def _end_to_end(shards: ShardSet, builder: PromptBuilder, case: str) -> list[Row]:
    stream = TrainStream(shards, builder, SETTINGS)
    facts = stream.plan.facts(0)
    with timed() as timer:
        tokens = sum(row.num_tokens for step in islice(stream, min(100, facts.num_steps)) for row in step.rows)
    return [
        Row("stream", case, "tokenized, packed rows", tokens / timer.cpu, "tokens/CPU-s", "what one worker core feeds"),
        Row("stream", case, "row fill", facts.fill, "share"),
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


def _write(folder: Path, num_samples: int) -> ShardSet:
    starts = range(0, num_samples, SAMPLES_PER_SHARD)
    facts = [
        write_shard(
            folder / f"train-{number:06d}.tar",
            (_sample(i) for i in range(start, min(start + SAMPLES_PER_SHARD, num_samples))),
        )
        for number, start in enumerate(starts)
    ]
    write_split_manifest(folder, facts, {}, {})
    return ShardSet(folder)


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
