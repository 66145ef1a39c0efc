"""The stream's promises: each user once an epoch, equal steps on every rank, the same batches after any restart."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from tests.shards.world import make_builder, make_sample, make_split, write_split
from trsr_dist.errors import CheckpointError, ConfigError
from trsr_dist.hashing import digest
from trsr_dist.shards.measure import Share
from trsr_dist.shards.plan import PackingSettings, epoch_facts, step_specs
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.steps import Step, StreamState
from trsr_dist.shards.stream import TrainStream, advise_ahead

SETTINGS = PackingSettings(row_tokens=600, rows_per_step=5, negatives_per_positive=2, seed=3)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 samples, so that a small split has several."""
    monkeypatch.setattr("trsr_dist.shards.plan.WINDOW_SAMPLES", 64)
    monkeypatch.setattr("trsr_dist.shards.plan.WINDOW_ROWS", 4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make_split(tmp_path_factory.mktemp("split") / "train")


def global_steps(
    shards: ShardSet, world_size: int, count: int, state: StreamState | None = None, num_workers: int = 0
) -> list[tuple]:
    """What all ranks together see in each step: user ids and token hashes of every row."""
    streams = [
        iter(TrainStream(shards, make_builder(), SETTINGS, Share(rank, world_size, num_workers), state=state))
        for rank in range(world_size)
    ]
    return [_together(steps) for steps in islice(zip(*streams, strict=True), count)]


def _together(steps: tuple[Step, ...]) -> tuple:
    first = steps[0]
    assert len({len(step.rows) for step in steps}) == 1, "every rank has the same number of rows"
    assert all(step.state == first.state and step.num_answers == first.num_answers for step in steps)
    assert sum(row.num_answers for step in steps for row in step.rows) == first.num_answers
    rows = {
        number: (row.users, row.items, digest(row.token_ids.tolist()), digest(row.position_ids.tolist()))
        for step in steps
        for number, row in zip(step.numbers, step.rows, strict=True)
        if row.num_answers
    }
    return first.epoch, tuple(rows[number] for number in sorted(rows)), first.state


def users_of(steps: list[tuple], epoch: int) -> Counter[str]:
    return Counter(user for step in steps if step[0] == epoch for row in step[1] for user in row[0])


def test_every_user_once_an_epoch(shards: ShardSet) -> None:
    stream = TrainStream(shards, make_builder(), SETTINGS)
    count = stream.steps_in_epoch(0) + stream.steps_in_epoch(1)
    steps = global_steps(shards, 1, count)
    for epoch in (0, 1):
        users = users_of(steps, epoch)
        assert len(users) == len(shards) and set(users.values()) == {1}
    assert steps[-1][2].epoch == 2 and steps[-1][2].step == count
    assert [step[1] for step in steps[: stream.steps_in_epoch(0)]] != [step[1] for step in steps[-len(steps) // 2 :]]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_world_size_does_not_change_the_steps(shards: ShardSet, world_size: int) -> None:
    assert global_steps(shards, world_size, 25) == global_steps(shards, 1, 25)


def test_resume_on_other_ranks_and_workers(shards: ShardSet) -> None:
    whole = global_steps(shards, 1, 24)
    first = global_steps(shards, 3, 7)
    saved = StreamState.from_dict(first[-1][2].to_dict())
    middle = global_steps(shards, 2, 9, saved, num_workers=1)
    last = global_steps(shards, 1, 8, middle[-1][2], num_workers=2)
    assert first + middle + last == whole


def test_a_restart_plans_the_next_step_only(shards: ShardSet) -> None:
    stream = TrainStream(shards, make_builder(), SETTINGS)
    assert stream.plan.order.num_windows == 4
    states = [step.state for step in islice(stream, stream.steps_in_epoch(0))]
    late = next(state for state in states if state.window == 2)
    resumed = TrainStream(shards, make_builder(), SETTINGS, state=late)
    next(step_specs(resumed.plan, late, 0, 1))
    assert resumed.steps_in_epoch(0) == len(states), "counted once, by the first"
    assert resumed.plan.window.cache_info().misses <= 2, "a step may end in the next window"


def test_rank_0_counts_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_split(tmp_path / "train")
    counting, waiting = (TrainStream(shards, make_builder(), SETTINGS).plan for _ in range(2))
    waiting.facts = None
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(epoch_facts, waiting, 0, 1)
        counted = epoch_facts(counting, 0)
        assert told.result(timeout=60) == counted
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # lengths that another user has measured
    files = sorted(counting.lengths.folder.iterdir())
    assert epoch_facts(counting, 1, 1).num_steps and sorted(counting.lengths.folder.iterdir()) == files


def test_reading_ahead_changes_and_loses_nothing(shards: ShardSet) -> None:
    stream = TrainStream(shards, make_builder(), SETTINGS)
    state = next(iter(stream)).state
    for count in (0, 1, 9):
        specs = list(islice(step_specs(stream.plan, state, 0, 1), count))
        assert list(advise_ahead(iter(specs), shards)) == specs


def test_negatives_change_with_the_epoch_and_positives_stay(shards: ShardSet) -> None:
    stream = TrainStream(shards, make_builder(), SETTINGS)
    seen: dict[str, list[tuple]] = {}
    for step in islice(stream, stream.steps_in_epoch(0) + stream.steps_in_epoch(1)):
        for user, items, labels in _answers(step):
            assert sum(labels) == 1 and len(labels) == 3
            seen.setdefault(user, []).append(items)
    assert all(len(draws) == 2 for draws in seen.values())
    assert sum(first != second for first, second in seen.values()) > len(seen) / 2


def _answers(step: Step) -> Iterator[tuple[str, tuple, list[int]]]:
    for row in step.rows:
        for group, user in enumerate(row.users):
            places = [i for i in range(row.num_answers) if row.group[i] == group]
            yield user, tuple(row.items[i] for i in places), [int(row.labels[i]) for i in places]


def test_state_of_other_settings_is_refused(shards: ShardSet) -> None:
    state = next(iter(TrainStream(shards, make_builder(), SETTINGS))).state
    with pytest.raises(CheckpointError, match="seed"):
        TrainStream(shards, make_builder(), SETTINGS, state=StreamState.from_dict(state.to_dict() | {"seed": 4}))
    with pytest.raises(CheckpointError, match="another version of this package"):
        StreamState.from_dict(state.to_dict() | {"unknown": 1})


def test_candidates_that_do_not_fit_are_cut_in_chunks(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (20,))
    lengths = TrainStream(shards, make_builder(), SETTINGS).plan.lengths.facts
    tight = PackingSettings(lengths.longest_prompt + 10, 4, 6, 0)
    stream = TrainStream(shards, make_builder(), tight)
    facts = stream.plan.facts(0)
    steps = list(islice(stream, facts.num_steps))
    assert facts.num_chunks > 0
    assert sum(step.num_users for step in steps) == 20
    assert sum(step.num_answers for step in steps) == 20 * 7
    items = Counter(item for step in steps for row in step.rows for item in row.items)
    assert len(items) == 20 * 7 and set(items.values()) == {1}
    assert all(row.num_tokens <= tight.row_tokens for step in steps for row in step.rows)


def test_trimmed_users_have_the_planned_tokens(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (30,))
    stream = TrainStream(shards, make_builder(max_tokens=90), SETTINGS)
    assert stream.plan.lengths.facts.trimmed_users["summary_words_cut"] > 0
    builder = make_builder(max_tokens=90)
    full = {user.user: user for user in map(builder.build, shards.read_many(range(30)))}
    for step in islice(stream, stream.steps_in_epoch(0)):
        for row in step.rows:
            assert row.prefix_lengths == tuple(len(full[user].prefix) for user in row.users)


@pytest.mark.parametrize(
    ("scheme", "kept", "shown", "problem"),
    [
        ("hierarchical", 3, 3, ""),
        ("hierarchical", 3, 2, ""),
        ("hierarchical", 3, 4, "its users have no more"),
        ("raw", 3, 3, ""),
        ("raw", 3, 2, "its older items end before those"),
        ("raw", 3, 4, "its users have no more"),
    ],
)
def test_no_item_is_lost_between_shards_and_prompt(
    tmp_path: Path, scheme: str, kept: int, shown: int, problem: str
) -> None:
    shards = write_split(tmp_path, [make_sample(0)], [1], scheme=scheme, recent_items=kept)
    if not problem:
        shards.check_recent_items(shown)
        return
    with pytest.raises(ConfigError, match=rf"recent_items={kept}, and {problem}; the prompt shows {shown}; set"):
        TrainStream(shards, make_builder(recent_items=shown), SETTINGS)
