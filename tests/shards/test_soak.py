"""Three epochs over a million small samples, with ranks killed and their number changed at random."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.tokenizers import word_level
from trsr_dist.files import read_json, write_json
from trsr_dist.hashing import hash64, random_stream
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import Candidate, Sample
from trsr_dist.shards.cache import ShardCache
from trsr_dist.shards.manifest import ShardFacts, write_split_manifest
from trsr_dist.shards.measure import Share, measure_lengths
from trsr_dist.shards.plan import PackingSettings, TrainPlan, epoch_facts, step_specs
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.steps import Step, StreamState
from trsr_dist.shards.stream import TrainStream
from trsr_dist.shards.writer import write_shard

NUM_SAMPLES = 10**6
SAMPLES_PER_SHARD = 1000
NUM_EPOCHS = 3
NUM_KILLS = 10
SAVE_EVERY_STEPS = 20
SETTINGS = PackingSettings(row_tokens=2048, rows_per_step=12, negatives_per_positive=1, seed=5)
WORDS = ("storm", "final", "market", "tennis", "senate", "orbit", "garden", "river", "Answer", "yes", "no", ":")
STATE = "state.json"


def make_small_sample(number: int) -> Sample:
    draw = random_stream("soak", number)
    texts = [" ".join(draw.choices(WORDS[:8], k=draw.randint(1, 6))) for _ in range(6)]
    candidates = tuple(Candidate(f"i{number}-{i}", text, int(i == 0)) for i, text in enumerate(texts[:4]))
    return Sample(f"u{number}", "Next?", texts[4], (texts[5],), candidates)


def write_one(folder: Path, first: int, last: int) -> ShardFacts:
    return write_shard(folder / f"train-{first:09d}.tar", map(make_small_sample, range(first, last)))


def write_small_split(folder: Path, num_samples: int) -> ShardSet:
    starts = range(0, num_samples, SAMPLES_PER_SHARD)
    ends = [min(start + SAMPLES_PER_SHARD, num_samples) for start in starts]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        facts = list(pool.map(write_one, [folder] * len(starts), starts, ends, chunksize=4))
    write_split_manifest(folder, facts, {}, {})
    return ShardSet(folder)


def builder() -> PromptBuilder:
    return PromptBuilder(word_level(WORDS))


def train(rank: int, world_size: int, root: Path, start: int, num_workers: int) -> None:
    """One rank of one start; what it has trained goes to its own log, step by step."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{root}/store-{start}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    state = StreamState.from_dict(read_json(root / STATE)) if (root / STATE).is_file() else None
    cache = ShardCache(root / "disk", max_bytes=(root / "half").stat().st_size)
    shards = ShardSet(root / "train", cache)
    with open(root / f"log-{start}-{rank}", "wb", buffering=0) as log:
        for step in TrainStream(shards, builder(), SETTINGS, Share(rank, world_size, num_workers), state=state):
            dist.all_reduce(torch.ones(1))
            log.write(record(step))
            if rank == 0 and step.state.step % SAVE_EVERY_STEPS == 0:
                write_json(root / STATE, step.state.to_dict())
            if step.state.epoch == NUM_EPOCHS:
                break
    dist.destroy_process_group()


def record(step: Step) -> bytes:
    """int64s: step, epoch, hash of all rows, users and their number before them."""
    users = [int(user[1:]) for row in step.rows for user in row.users]
    hashes = [
        hash64(number, row.token_ids.tobytes(), row.position_ids.tobytes(), row.labels.tobytes()) >> 1
        for number, row in zip(step.numbers, step.rows, strict=True)
        if row.num_answers
    ]
    mixed = np.bitwise_xor.reduce(np.array(hashes or [0], np.int64))
    return np.array([step.state.step, step.epoch, mixed, len(users), *users], np.int64).tobytes()


def read_log(path: Path) -> dict[int, tuple[int, int, list[int]]]:
    """Epoch, hash and users of each step; a record that a kill has torn is passed over."""
    values, steps, place = np.frombuffer(_whole_int64s(path), np.int64), {}, 0
    while place + 4 <= len(values) and place + 4 + values[place + 3] <= len(values):
        step, epoch, mixed, count = values[place : place + 4].tolist()
        steps[step] = (epoch, mixed, values[place + 4 : place + 4 + count].tolist())
        place += 4 + count
    return steps


def _whole_int64s(path: Path) -> bytes:
    content = path.read_bytes() if path.is_file() else b""
    return content[: len(content) // 8 * 8]


def global_steps(root: Path, start: int, world_size: int) -> dict[int, tuple[int, int, list[int]]]:
    """What all ranks of a start have trained together; steps that a kill has cut off are left out."""
    logs = [read_log(root / f"log-{start}-{rank}") for rank in range(world_size)]
    together = {}
    for step in set.intersection(*(set(log) for log in logs)):
        parts = [log[step] for log in logs]
        mixed = int(np.bitwise_xor.reduce([part[1] for part in parts]))
        together[step] = (parts[0][0], mixed, sorted(user for part in parts for user in part[2]))
    return together


def run_start(
    root: Path, start: int, world_size: int, num_workers: int, kill_at: int | None, draw: random.Random
) -> None:
    """Start all ranks; kill one of them once a step is reached, or let them finish."""
    context = multiprocessing.get_context("spawn")
    arguments = (world_size, root, start, num_workers)
    ranks = [context.Process(target=train, args=(rank, *arguments)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    try:
        while kill_at is not None and max(read_log(root / f"log-{start}-0"), default=0) < kill_at:
            assert all(rank.is_alive() for rank in ranks), "a rank has died by itself"
            time.sleep(0.2)
        if kill_at is None:
            for rank in ranks:
                rank.join()
                assert rank.exitcode == 0
        else:
            draw.choice(ranks).kill()
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def soak(root: Path, num_samples: int, num_kills: int) -> None:
    draw = random_stream("soak", num_samples)
    shards = write_small_split(root / "train", num_samples)
    with open(root / "half", "wb") as stream:  # its size is the cache's limit: half of the shards find room
        os.truncate(stream.fileno(), sum(facts["num_bytes"] for facts in shards.facts) // 2)
    plan = TrainPlan(measure_lengths(shards, builder(), Share(num_workers=2)), SETTINGS)
    num_steps = [epoch_facts(plan, epoch).num_steps for epoch in range(NUM_EPOCHS)]
    kills = sorted(draw.randint(1, sum(num_steps)) for _ in range(num_kills))
    trained: dict[int, tuple[int, int, list[int]]] = {}
    num_replayed = 0
    for start, kill_at in enumerate([*kills, None]):
        world_size = draw.randint(1, 4)
        run_start(root, start, world_size, draw.randint(0, 1), kill_at, draw)
        for step, seen in global_steps(root, start, world_size).items():
            assert trained.setdefault(step, seen) == seen, f"start {start} on {world_size} ranks differs in step {step}"
            num_replayed += trained[step] is not seen
    assert sorted(trained) == list(range(1, sum(num_steps) + 1))
    assert num_replayed > 0, "a kill must cost some steps, or nothing was compared"
    for step, users in planned_users(plan, shards):
        assert trained[step][2] == users
    for epoch in range(NUM_EPOCHS):
        users = [user for seen in trained.values() if seen[0] == epoch for user in seen[2]]
        assert sorted(users) == list(range(num_samples)), f"epoch {epoch}"


def planned_users(plan: TrainPlan, shards: ShardSet) -> Iterator[tuple[int, list[int]]]:
    """Users of every step of one uninterrupted process; in this split a sample's number is its user's."""
    state = StreamState(0, 0, 0, 0, shards.manifest_hash, builder().fingerprint, plan.identity, **asdict(SETTINGS))
    for spec in step_specs(plan, state, 0, 1):
        yield spec.state.step, sorted({unit.sample for row in spec.rows for unit in row})
        if spec.state.epoch == NUM_EPOCHS:
            return


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_three_epochs_of_a_million_samples_under_kills(tmp_path: Path) -> None:
    soak(tmp_path, NUM_SAMPLES, NUM_KILLS)
