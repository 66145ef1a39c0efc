"""The head: what all prefixes of a split begin with is measured, and a row has room for more users by it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.shards.world import flip_byte, make_builder, make_sample, make_split, write_split
from trsr_dist.errors import DataError
from trsr_dist.shards.lengths import Lengths, Table, lengths_folder
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.plan import PackingSettings, TrainPlan, WindowPlan
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.stream import TrainStream

SIZES = (9, 14, 7)
SETTINGS = PackingSettings(row_tokens=400, rows_per_step=3, negatives_per_positive=1, seed=1)


def common_length(shards: ShardSet) -> int:
    """Tokens that all prefixes begin with, found by looking at all of them; each keeps one more."""
    prefixes = [make_builder().build(sample).prefix for sample in shards.read_many(range(len(shards)))]
    columns = list(zip(*prefixes, strict=False))
    equal = [len(set(column)) == 1 for column in columns]
    return min(equal.index(False) if False in equal else len(equal), min(map(len, prefixes)) - 1)


def test_the_head_is_common_to_all_users(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", SIZES)
    head = measure_lengths(shards, make_builder()).facts.head_tokens
    assert head == common_length(shards) > 5


def test_one_user_with_other_words_shortens_it(tmp_path: Path) -> None:
    samples = [make_sample(number) for number in range(sum(SIZES))]
    samples[20] = replace(samples[20], instruction="Would anyone else?")
    shards = write_split(tmp_path / "train", samples, SIZES)
    head = measure_lengths(shards, make_builder()).facts.head_tokens
    assert head == common_length(shards) < common_length(make_split(tmp_path / "same", SIZES))


def test_users_with_nothing_but_the_instruction_keep_a_token_of_their_own(tmp_path: Path) -> None:
    samples = [replace(make_sample(number), summary="", recent=()) for number in range(5)]
    shards = write_split(tmp_path / "train", samples, (5,))
    lengths = measure_lengths(shards, make_builder())
    assert lengths.facts.head_tokens == lengths.table([(0, 5)]).prefixes.min() - 1


def test_rows_hold_the_head_once(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", SIZES)
    stream = TrainStream(shards, make_builder(), SETTINGS)
    head, facts = stream.plan.head, stream.plan.facts(0)
    rows = [row for step in islice(stream, facts.num_steps) for row in step.rows if row.num_answers]
    planned = [head + sum(np.array(row.prefix_lengths) - head) + sum(map(sum, row.suffix_lengths)) for row in rows]
    assert sum(planned) == facts.num_tokens and max(planned) <= SETTINGS.row_tokens
    assert facts.fill == pytest.approx(np.mean(planned) / SETTINGS.row_tokens)
    assert all(row.num_tokens <= tokens for row, tokens in zip(rows, planned, strict=True))
    assert all(row.head_length >= head for row in rows if len(row.users) > 1)


def test_more_users_share_a_row_by_it_and_what_fits_without_still_fits(tmp_path: Path) -> None:
    lengths = measure_lengths(make_split(tmp_path / "train", (200,)), make_builder())
    table, every = lengths.table([(0, 200)]), np.ones(lengths.facts.num_candidates, dtype=bool)
    head = lengths.facts.head_tokens
    with_head, without = (WindowPlan(table, every, 1200, 0, tokens) for tokens in (head, 0))
    assert with_head.num_rows < without.num_rows and with_head.num_chunks == without.num_chunks
    assert with_head.num_tokens == without.num_tokens - head * (200 - with_head.num_rows)
    assert sum(with_head.num_users(row) for row in range(with_head.num_rows)) == 200


@pytest.mark.parametrize(("head", "share"), [(0, 4), (60, 4), (60, 8)])
def test_rows_of_a_window_are_full(head: int, share: int) -> None:
    """Users of news: a prefix, one positive and some negatives; rows a few times the longest of them."""
    draw = np.random.default_rng(share)
    prefixes, counts = head + draw.integers(40, 500, 8192), draw.integers(2, 6, 8192)
    suffixes, starts = draw.integers(5, 60, counts.sum()), np.concatenate([[0], np.cumsum(counts)])
    labels = np.isin(np.arange(len(suffixes)), starts[:-1])
    table = Table(np.arange(8192), prefixes, np.zeros(8192, dtype=bool), starts, suffixes, labels)
    row_tokens = share * int(table.unit_tokens().max())
    plan = WindowPlan(table, np.ones(len(suffixes), dtype=bool), row_tokens, 7, head)
    assert plan.num_tokens / (plan.num_rows * row_tokens) >= 0.97
    assert sorted(unit.sample for row in range(plan.num_rows) for unit in plan.units(row)) == list(range(8192))


def test_users_longer_than_a_row_are_cut_where_they_would_be_without_it(tmp_path: Path) -> None:
    lengths = measure_lengths(make_split(tmp_path / "train", (20,)), make_builder())
    settings = PackingSettings(lengths.facts.longest_prompt, 2, 6, 0)
    plan = TrainPlan(lengths, settings).window(0, 0)
    assert plan.num_chunks > 0
    for row in range(plan.num_rows):
        units = plan.units(row)
        own = sum(unit.prefix - lengths.facts.head_tokens + sum(unit.suffixes) for unit in units)
        assert lengths.facts.head_tokens + own <= settings.row_tokens


def test_lengths_of_a_restored_shard_are_measured_again(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", SIZES)
    place = int(shards.index(1)[2]["offset"]) + 9
    flip_byte(shards.path(1), place)
    facts = measure_lengths(shards, make_builder(), tolerate=True).facts
    assert facts.num_damaged == 1 and facts.damaged == ("train-000001.tar",)
    with pytest.raises(DataError, match="sample 2 .*checksum"):
        measure_lengths(shards, make_builder())
    flip_byte(shards.path(1), place)
    assert measure_lengths(shards, make_builder()).facts.num_damaged == 0


@pytest.mark.parametrize("content", [b"", b"not lengths", b"\0" * 64, None])
def test_damaged_lengths_are_measured_again(tmp_path: Path, content: bytes | None) -> None:
    shards = make_split(tmp_path / "train", SIZES)
    folder = lengths_folder(shards, make_builder())
    table = measure_lengths(shards, make_builder()).table([(0, 30)])
    path = folder / "train-000001.tar.lengths"
    path.write_bytes(path.read_bytes()[:-4] if content is None else content)
    (folder / "summary.json").unlink()
    measure_lengths(shards, make_builder())
    assert np.array_equal(Lengths(shards, folder).table([(0, 30)]).suffixes, table.suffixes)


@pytest.mark.parametrize("damage", ["missing", "truncated", "a flipped label"])
def test_damaged_lengths_of_a_measured_split_are_refused(tmp_path: Path, damage: str) -> None:
    """As after a copy that was interrupted: the summary came first. Other labels would be another draw."""
    shards = make_split(tmp_path / "train", SIZES)
    path = measure_lengths(shards, make_builder()).folder / "train-000001.tar.lengths"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        flip_byte(path, path.stat().st_size - 4)
    words = "missing" if damage == "missing" else "damaged, its checksum differs"
    with pytest.raises(DataError, match=rf"train-000001\.tar\.lengths: {words}; remove "):
        measure_lengths(shards, make_builder()).table([(0, 30)])


def test_processes_measure_what_one_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With much to measure all cores of the rank take part, without being asked."""
    alone, together = (make_split(tmp_path / name, SIZES) for name in ("alone", "together"))
    measure_lengths(alone, make_builder())
    monkeypatch.setattr("trsr_dist.shards.measure.MANY_SAMPLES", 1)
    monkeypatch.setattr("trsr_dist.shards.measure.cores_of_a_rank", lambda: 3)
    folder = measure_lengths(together, make_builder()).folder
    for path in lengths_folder(alone, make_builder()).iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
