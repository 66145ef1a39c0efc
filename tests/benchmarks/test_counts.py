"""Counted work, so that a loss of speed shows without a clock: tokens, FLOPs, forward passes, prompts, bytes read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from benchmarks.mixes import AMAZON, MIND, Mix
from benchmarks.training import Bench
from benchmarks.ways import LORA_RANK, SHAPE, TARGETS, make_user, row_work
from tests.merge.models import load, make_base
from tests.shards.world import make_builder, make_sample, make_split
from tests.tokenizers import byte_level
from trsr_dist.evaluate.parts import PartScorer
from trsr_dist.model.recommender import Recommender, score_row
from trsr_dist.planner.flops import Workload, training_flops
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.rows import PackedRow, pack_row
from trsr_dist.shards.plan import PackingSettings
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.stream import TrainStream
from trsr_dist.summarize.plans import planner

CPU = torch.device("cpu")


def mix_row(mix: Mix, count: int) -> PackedRow:
    return pack_row([make_user(f"u{n}", p, s, mix.head) for n, (p, s) in enumerate(mix.users(range(10), count))])


@pytest.mark.parametrize(
    ("mix", "count", "least"), [(MIND, 2, 1.9), (MIND, 5, 4.3), (AMAZON, 2, 1.8), (AMAZON, 5, 3.5)]
)
def test_tokens_of_real_lengths(mix: Mix, count: int, least: float) -> None:
    """Separate sequences over shared ones."""
    row = mix_row(mix, count)
    assert row.num_separate_tokens / row.num_tokens > least
    assert row.num_tokens == sum(row.prefix_lengths) + sum(map(sum, row.suffix_lengths)) - 9 * mix.head


def test_flops_of_a_training_step() -> None:
    """Linear modules, forward and backward, by torch's counter; its count of this attention is zero."""
    bench = Bench(LlamaConfig(**(SHAPE | {"num_hidden_layers": 3})), 1.0)
    users = [make_user(f"user {number}", 60, (9, 7, 8), 20) for number in range(3)]
    way, row, shape = bench.ours(users), pack_row(users), bench.shape
    with FlopCounterMode(display=False) as counter:
        way.step()
    work = Workload(row.num_tokens, 0, row.num_answers)
    lora = shape.num_lora_parameters(LORA_RANK, TARGETS)
    planned = training_flops(shape, work, lora, answer_pairs=0)
    # Beyond the plan: the output head is multiplied whole at the answers. Below it: no gradient for the inputs of the
    # first layer, and adapters of the last layer's queries and outputs at the answers alone.
    head = 2 * 2 * shape.hidden_size * (shape.vocab_size - 2) * row.num_answers
    first = (
        2
        * row.num_tokens
        * sum(rows * columns + LORA_RANK * rows for rows, columns in (shape.linears[name] for name in TARGETS[:3]))
    )
    last = (
        6
        * (row.num_tokens - row.num_answers)
        * LORA_RANK
        * sum(sum(shape.linears[name]) for name in ("q_proj", "o_proj"))
    )
    assert counter.get_total_flops() == planned + head - first - last
    assert row_work(row).tokens == row.num_tokens


def test_forward_passes_of_an_evaluation(tmp_path: Path) -> None:
    """One a row, and rows hold several users with all their candidates."""
    builder = PromptBuilder(byte_level(chat=True), style="plain", max_tokens=400)
    model = Recommender(load(make_base(tmp_path)), builder.answer_ids, "cpu").eval()
    passes = []
    model.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    samples = [make_sample(number, num_negatives=20) for number in range(12)]
    part = PartScorer([builder.build(sample) for sample in samples], row_tokens=4096)
    for row in part.rows():
        score_row(model, row, CPU)
    assert len(passes) == len(part) <= 5
    assert sum(passes) == 12 * 21


@pytest.mark.parametrize(("num_items", "tree", "chain"), [(5, 1, 1), (10, 3, 2), (25, 6, 5), (26, 7, 6), (100, 24, 20)])
def test_prompts_of_a_user(num_items: int, tree: int, chain: int) -> None:
    """Blocks of five items; eight summaries are merged at a time."""
    assert len(planner("hierarchical")(num_items, 5, 8)) == tree
    assert len(planner("recurrent")(num_items, 5, 8)) == chain
    assert len(planner("none")(num_items, 5, 8)) == len(planner("raw")(num_items, 5, 8)) == 0


def test_bytes_read_in_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample's bytes once, and no others, once lengths are measured."""
    shards, builder = make_split(tmp_path / "train"), make_builder()
    settings = PackingSettings(row_tokens=1000, rows_per_step=6, negatives_per_positive=2, seed=0)
    stream = TrainStream(shards, builder, settings)
    sizes, pread = [], os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    steps = iter(stream)
    for _ in range(stream.plan.facts(0).num_steps):
        next(steps)
    assert len(sizes) == len(ShardSet(shards.folder)) == 200
    assert sum(sizes) == sum(int(row["num_bytes"]) for number in range(4) for row in shards.shard(number).rows)
