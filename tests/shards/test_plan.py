"""Plan and steps against plain restatements: what stands in which row, and which rank gets it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from tests.shards.test_rules import plain_mix
from tests.shards.world import make_builder, make_split
from trsr_dist.errors import CheckpointError, ConfigError, DataError
from trsr_dist.hashing import digest, hash64
from trsr_dist.shards.lengths import LengthFacts, Lengths, Table
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.order import Order
from trsr_dist.shards.packing import choose_candidates, deal
from trsr_dist.shards.plan import EpochFacts, PackingSettings, TrainPlan, WindowPlan, check_fits, step_specs
from trsr_dist.shards.steps import Step, StreamState, Unit

TABLE = Table(
    samples=np.array([40, 41, 7, 8, 9, 10]),
    prefixes=np.array([30, 5, 20, 70, 43, 10]),
    trimmed=np.array([False, True, False, False, True, False]),
    starts=np.array([0, 3, 5, 11, 12, 13, 14]),
    suffixes=np.array([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]),
    labels=np.zeros(14, dtype=bool),
)
CHOSEN = np.array([1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0], dtype=bool)
"""The third user's 20 + 75 tokens do not fit 60 and are cut in (10, 11, 12), (13, 14), (15); the fourth
and the last have none, though the fourth's prefix is too long; the fifth's 60 tokens fit."""
UNITS = {
    Unit(40, 30, False, (0, 2), (5, 7)),
    Unit(41, 5, True, (1,), (9,)),
    Unit(7, 20, False, (0, 1, 2), (10, 11, 12)),
    Unit(7, 20, False, (3, 4), (13, 14)),
    Unit(7, 20, False, (5,), (15,)),
    Unit(9, 43, True, (0,), (17,)),
}


def pairs(unit: Unit) -> int:
    """Query-key pairs: each token reads itself and what stands before it."""
    reads = [*range(1, unit.prefix + 1)]
    return sum(reads) + sum(unit.prefix + place + 1 for length in unit.suffixes for place in range(length))


@pytest.mark.parametrize("head", [0, 4])
def test_a_windows_rows_by_hand(head: int) -> None:
    plan = WindowPlan(TABLE, CHOSEN, 60, 11, *([head] if head else []))
    rows = [plan.units(row) for row in range(plan.num_rows)]
    assert Counter(unit for row in rows for unit in row) == Counter(UNITS)
    own = {unit: unit.prefix - head + sum(unit.suffixes) for unit in UNITS}
    assert plan.num_chunks == 2 and max(map(len, rows)) == 2
    assert plan.num_tokens == sum(own.values()) + head * len(rows)
    for number, row in enumerate(rows):
        tokens = head + sum(own[unit] for unit in row)
        assert tokens <= 60
        assert plan.cost(number) == pytest.approx(tokens + sum(map(pairs, row)) / 24576, abs=1e-12)
        assert plan.num_answers(number) == sum(len(unit.candidates) for unit in row)
    users = [sum(unit.sample != 7 or unit.candidates[0] == 0 for unit in row) for row in rows]
    assert [plan.num_users(number) for number in range(len(rows))] == users and sum(users) == 4


def test_a_windows_rows_stand_in_the_order_of_the_key() -> None:
    """Units of 26 tokens, alone in their rows: packed by ties, then mixed, both by the key."""
    count = 12
    table = Table(
        np.arange(100, 100 + count),
        np.full(count, 20),
        np.zeros(count, dtype=bool),
        np.arange(count + 1),
        np.full(count, 6),
        np.ones(count, dtype=bool),
    )
    plan = WindowPlan(table, np.ones(count, dtype=bool), 40, key=2**63 + 12)
    assert plan.num_tokens == 26 * count
    by_ties = sorted(range(100, 100 + count), key=lambda sample: plain_mix(sample ^ (2**63 + 12)))
    places = sorted(range(count), key=lambda place: plain_mix(place ^ (2**63 + 12)))
    assert [plan.units(row)[0].sample for row in range(count)] == [by_ties[place] for place in places]


SETTINGS = PackingSettings(row_tokens=600, rows_per_step=5, negatives_per_positive=2, seed=3)


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> Lengths:
    shards = make_split(tmp_path_factory.mktemp("split") / "train", sizes=(70, 5, 65))
    return measure_lengths(shards, make_builder())


@pytest.fixture
def plan(lengths: Lengths, monkeypatch: pytest.MonkeyPatch) -> TrainPlan:
    """With three windows."""
    monkeypatch.setattr("trsr_dist.shards.plan.WINDOW_SAMPLES", 64)
    monkeypatch.setattr("trsr_dist.shards.plan.WINDOW_ROWS", 1)
    return TrainPlan(lengths, SETTINGS)


def rows_of(plan: WindowPlan) -> list[tuple[Unit, ...]]:
    return [plan.units(row) for row in range(plan.num_rows)]


def test_a_plans_windows_by_their_parts(plan: TrainPlan, lengths: Lengths) -> None:
    assert plan.order == Order(140, 2, 3)
    assert plan.head == lengths.facts.head_tokens > 0
    for epoch, windows in ((0, [*plan.windows(0)]), (1, [*plan.windows(1)])):
        assert len(windows) == 3
        for window, found in enumerate(windows):
            runs = plan.order.runs(epoch, window)
            table = lengths.table(runs)
            keys = np.concatenate([lengths.shards.keys(*run) for run in runs])
            chosen = choose_candidates(keys, table.starts, table.labels, 2, hash64(3, epoch, "negatives"))
            again = WindowPlan(table, chosen, 600, hash64(3, epoch, window, "rows"), plan.head)
            assert rows_of(found) == rows_of(again)


def counts_of(plan: TrainPlan, epoch: int) -> EpochFacts:
    rows = [row for window in plan.windows(epoch) for row in rows_of(window)]
    tokens = sum(plan.head + sum(unit.prefix - plan.head + sum(unit.suffixes) for unit in row) for row in rows)
    chunks = sum(len(row) for row in rows) - 140
    fill = tokens / (plan.settings.row_tokens * len(rows))
    return EpochFacts(-(-len(rows) // 5), len(rows), tokens, chunks, fill)


def test_an_epochs_counts(plan: TrainPlan, lengths: Lengths) -> None:
    """Which differ between epochs; and in rows so short that users are cut in each window."""
    assert plan.facts(1) == counts_of(plan, 1) != counts_of(plan, 0)
    limit = lengths.facts.longest_prompt + 1
    tight = TrainPlan(lengths, replace(SETTINGS, row_tokens=limit, negatives_per_positive=6))
    assert tight.facts(1) == counts_of(tight, 1)
    assert tight.facts(1).num_rows % 5, "the last step is not full"
    assert all(window.num_chunks for window in tight.windows(1))


def test_the_plans_of_epochs_are_kept_for_a_while(plan: TrainPlan) -> None:
    for _ in range(2):
        plan.window(0, 0), plan.window(0, 1), plan.facts(0)
    assert plan.window.cache_info().currsize == 2 and plan.facts.cache_info().hits == 1
    assert (plan.window.cache_info().maxsize, plan.facts.cache_info().maxsize) == (2, 64)


def test_the_identity_of_a_plan_is_that_of_its_lengths(plan: TrainPlan) -> None:
    facts = plan.lengths.facts
    fields = {name: getattr(facts, name) for name in facts.__slots__}
    assert plan.identity == digest([1, fields])[:16]


@pytest.mark.parametrize(
    ("candidates", "negatives", "row_tokens", "samples"),
    [
        (5000, 1, 2000, 8192),
        (5000, 1, 40_000, 64 * 39_900 / (150 - 100 + 50 / 5 * 2)),
        (5000, 9, 40_000, 64 * 39_900 / (150 - 100 + 50)),
        (1000, 9, 40_000, 64 * 39_900 / (150 - 100 + 50)),
    ],
)
def test_a_window_holds_enough_rows(
    lengths: Lengths, candidates: int, negatives: int, row_tokens: int, samples: float
) -> None:
    """Prefixes of 150 tokens, a head of 100 of them; all suffixes of a user have 50."""
    facts = LengthFacts("", 1000, candidates, 150_000, 50_000, 250, 250, head_tokens=100)
    known = Lengths(lengths.shards, lengths.folder)
    known.facts = facts
    plan = TrainPlan(known, replace(SETTINGS, negatives_per_positive=negatives, row_tokens=row_tokens))
    assert plan.order.window_blocks == -(-round(samples) // 32)


def test_prompts_that_do_not_fit_are_refused(lengths: Lengths) -> None:
    longest = lengths.facts.longest_prompt
    check_fits(lengths, longest, "x.y")
    with pytest.raises(ConfigError, match=rf"x.y={longest - 1}: the longest prompt has {longest} tokens"):
        check_fits(lengths, longest - 1, "x.y")
    with pytest.raises(ConfigError, match=r"train.row_tokens=3: the longest prompt"):
        TrainPlan(lengths, replace(SETTINGS, row_tokens=3))
    empty = Lengths(lengths.shards, lengths.folder)
    empty.facts = replace(lengths.facts, num_candidates=0)
    with pytest.raises(DataError, match="no candidates in 140 samples"):
        check_fits(empty, 10**6, "x.y")


START = StreamState(0, 0, 0, 0, "shards", "prompt", "plan", 600, 5, 2, 3)


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_steps_are_the_rows_in_turn(plan: TrainPlan, world_size: int) -> None:
    epochs = [[(window, row) for window in plan.windows(epoch) for row in range(window.num_rows)] for epoch in (0, 1)]
    steps = [(epoch, rows[first : first + 5]) for epoch, rows in enumerate(epochs) for first in range(0, len(rows), 5)]
    ranks = [[*islice(step_specs(plan, START, rank, world_size), len(steps))] for rank in range(world_size)]
    for number, ((epoch, rows), specs) in enumerate(zip(steps, zip(*ranks, strict=True), strict=True)):
        hands = deal([window.cost(row) for window, row in rows], world_size)
        places = -(-5 // world_size)
        for rank, (spec, hand) in enumerate(zip(specs, hands, strict=True)):
            units = [rows[place][0].units(rows[place][1]) for place in hand]
            assert spec.rows == (*units, *[()] * (places - len(hand)))
            assert spec.numbers[: len(hand)] == tuple(hand)
            assert spec.numbers[len(hand) :] == tuple(
                5 + rank + world_size * place for place in range(places - len(hand))
            )
            assert spec.num_answers == sum(window.num_answers(row) for window, row in rows)
            assert spec.num_users == sum(window.num_users(row) for window, row in rows)
            assert (spec.epoch, spec.state.step) == (epoch, number + 1)
    assert len({number for spec in specs for number in spec.numbers}) == places * world_size, "no number twice"


def test_a_state_names_the_next_row(plan: TrainPlan) -> None:
    num_rows = [window.num_rows for window in plan.windows(0)]
    spots = [(0, window, row) for window, count in enumerate(num_rows) for row in range(count)]
    states = [spec.state for spec in islice(step_specs(plan, START, 0, 1), -(-len(spots) // 5))]
    assert [(s.epoch, s.window, s.row) for s in states] == [*spots[5::5], (1, 0, 0)]
    late = states[1]
    assert next(step_specs(plan, late, 0, 1)) == [*islice(step_specs(plan, START, 0, 1), 3)][2]
    assert StreamState.from_dict(late.to_dict()) == late
    assert StreamState.from_dict(late.to_dict() | {"teacher": "0123"}) == late, "it changes no rows"
    assert Step([], (), 0, 0, 0, late).errors == ()


def test_a_step_of_many_rows_goes_over_windows_and_ends_with_the_epoch(plan: TrainPlan) -> None:
    num_rows = sum(window.num_rows for window in plan.windows(0))
    wide = TrainPlan(plan.lengths, replace(SETTINGS, rows_per_step=num_rows))
    first, second = islice(step_specs(wide, replace(START, rows_per_step=num_rows), 0, 1), 2)
    assert [len(step.rows) for step in (first, second)] == [num_rows] * 2
    assert (first.state.epoch, first.state.window, first.state.row, first.epoch) == (1, 0, 0, 0)
    assert second.epoch == 1


FIELDS = ("shards", "prompt", "plan", "row_tokens", "rows_per_step", "negatives_per_positive", "seed")


@pytest.mark.parametrize("name", FIELDS)
def test_another_stream_is_refused_by_name(name: str) -> None:
    later = replace(START, epoch=2, window=1, row=3, step=40)
    later.check(START)
    with pytest.raises(
        CheckpointError, match=rf"stream has {name}='?\w+'?, this run 99: .* comes from .*\.[\w*]+.*--force"
    ):
        later.check(replace(START, **{name: 99}))
