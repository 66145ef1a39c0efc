"""What works on many users or rows at once gives what one at a time gives."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.raw import LENGTH, NUM_ITEMS, clicks, make_config, user_records, write_jsonl
from tests.data.test_prepare import manifest
from trsr_dist.data import assembly, jsonl
from trsr_dist.data.candidates import ItemPool, first_numbers
from trsr_dist.data.interactions import Interactions, json_columns
from trsr_dist.data.logs import ItemCodes, gather
from trsr_dist.data.prepare import prepare
from trsr_dist.data.ragged import Ragged
from trsr_dist.data.times import all_seconds, unix_seconds
from trsr_dist.files import sha256_of
from trsr_dist.run import SPLITS

LISTS = [[1, 2, 3], [], [4], [5, 6]]
NAMES = ("user", "item", "time")
FIRST = {"user": "u", "item": "a", "time": 5}


def test_lists_in_two_arrays() -> None:
    ragged = Ragged.from_lists(LISTS)
    assert ragged.arrow().to_pylist() == LISTS and ragged.lengths.tolist() == [3, 0, 1, 2]
    assert ragged.take(np.array([3, 0, 1])).arrow().to_pylist() == [[5, 6], [1, 2, 3], []]
    assert ragged.latest(2).arrow().to_pylist() == [[2, 3], [], [4], [5, 6]]
    assert ragged.latest(0) is ragged and ragged.list(0) == [1, 2, 3]
    assert ragged.owners.tolist() == [0, 0, 0, 2, 3, 3]
    assert ragged.joined(ragged.take(np.array([2, 3]))).arrow().to_pylist() == [*LISTS, [4], [5, 6]]
    assert [part.arrow().to_pylist() for part in ragged.take(np.array([2, 3])).parted()] == [[[], [5]], [[4], [6]]]
    assert Ragged.from_arrow([ragged.arrow(), ragged.arrow()]).arrow().to_pylist() == LISTS + LISTS


def test_first_numbers_are_those_of_the_streams() -> None:
    seeds = [0, 7, 2**63 + 5, 2**64 - 1]
    expected = [[stream.random() for _ in range(5)] for stream in map(random.Random, seeds)]
    assert first_numbers(seeds, 5).tolist() == expected


@pytest.mark.parametrize("first_seen", [None, np.array([9, 3, 5, 5, 1, 7, 8, 2])])
def test_first_draws_are_those_of_the_pool(first_seen: np.ndarray | None) -> None:
    pool = ItemPool(np.arange(8) * 10, np.array([1, 0, 5, 1, 2, 1, 1, 9]), first_seen)
    before, seeds = np.array([0, 6, 10, 10]), [4, 5, 6, 7]
    rows, is_enough = pool.first_draws(seeds, 3, before)
    assert is_enough.tolist() == ([True] * 4 if first_seen is None else [False, True, True, True])
    for place in np.flatnonzero(is_enough).tolist():
        drawn = pool.draw(3, set(), random.Random(seeds[place]), int(before[place]))
        found = rows[place].tolist()
        assert list(dict.fromkeys(found)) == drawn[: len(set(found))]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.candidates=popularity", "data.seen_before_target=true", "data.too_few_negatives=skip"),
        ("data.candidates=category", "data.train_targets=2"),
        ("train.pool_size=70", "evaluate.negatives_per_positive=53", "data.too_few_negatives=skip"),
    ],
)
def test_candidates_of_many_users_are_those_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    """Without limit, all users are drawn for one by one."""
    records = [record | {"user": f'"\u00fc{i}'} for i, record in enumerate(user_records(60))]
    records[7] |= {"target": ["N3", "N9"], "history": ["N1"]}
    write_jsonl(tmp_path, records)
    found = []
    for limit in (assembly.MOST_AT_ONCE, 0):
        monkeypatch.setattr(assembly, "MOST_AT_ONCE", limit)
        prepare(make_config(tmp_path, "jsonl", *overrides), force=True)
        found.append(manifest(tmp_path))
    assert found[0] == found[1]
    assert found[0]["splits"]["train"]["users"]


def interactions() -> list[dict]:
    """By time; the last ones say again what others have said."""
    rows = [
        {"user": f"u{user}", "item": clicks(user)[place], "time": 1_600_000_000 + 60 * place + user}
        for place in range(LENGTH)
        for user in range(24)
    ]
    return rows + rows[:3]


def hashes(folder: Path, data_format: str) -> list[str]:
    prepare(make_config(folder, data_format), force=True)
    return [sha256_of(folder / "run" / "histories" / f"{split}.arrow") for split in SPLITS]


@pytest.mark.parametrize(
    "row",
    [
        b'{"user": " u1 ", "item": "N5", "time": 1600000009}\r\n',
        b'{"user": "\\u00fc", "item": "N5", "time": 1600000009}\n',
        b'{"user": "u1", "item": "N5", "time": 1600000009.5}\n',
        b'{"user": "u1", "item": "N5", "time": "2020-09-13", "x": [{}, {}]}\n',
        b'{"user": 1, "item": "N5", "time": 1600000009000}\n',
        b' {"user": "u1", "item": "N5", "time": 1600000009} \n\n',
        b'{"user": "u1", "item": "N5", "time": 1600000009}',
    ],
)
def test_blocks_are_read_as_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: bytes) -> None:
    path = write_jsonl(tmp_path, interactions()) / "interactions.jsonl"
    path.write_bytes(path.read_bytes() + row)
    fast = hashes(tmp_path, "jsonl")
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 200)
    assert hashes(tmp_path, "jsonl") == fast
    monkeypatch.setattr(jsonl, "json_columns", lambda *args: None)
    assert hashes(tmp_path, "jsonl") == fast


@pytest.mark.parametrize("line", [b"{}\n", b'{"user": "u"}{"user": "u"}\n', b"\n", b'{"user": "u",\n"item": "i"}\n'])
def test_lines_that_are_no_record_each_are_read_one_by_one(line: bytes) -> None:
    plain = json.dumps(FIRST).encode() + b"\n"
    assert json_columns(plain * 3, NAMES, FIRST).num_rows == 3
    found = json_columns(plain + line, NAMES, FIRST)
    assert found is None or not Interactions().add_columns(found, 1, "", Counter())


@pytest.mark.parametrize("kind", [pa.timestamp("ms", "UTC"), pa.timestamp("s"), pa.float64(), pa.int64(), pa.string()])
def test_columns_of_parquet_are_read_as_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    raw = write_jsonl(tmp_path, interactions())
    expected = hashes(tmp_path, "jsonl")
    table = pa.Table.from_pylist(interactions())
    times = table["time"].cast(pa.timestamp("s", kind.tz)) if pa.types.is_timestamp(kind) else table["time"]
    columns = [table["user"], table["item"].dictionary_encode(), times.cast(kind)]
    table = pa.table(columns, names=NAMES)
    (raw / "interactions.jsonl").unlink()
    pq.write_table(table, raw / "interactions.parquet")
    assert hashes(tmp_path, "table") == expected
    monkeypatch.setattr(Interactions, "add_columns", lambda *args: False)
    assert hashes(tmp_path, "table") == expected


def test_times_of_a_column_are_those_of_its_values() -> None:
    whole = [0, -5, 10**11 - 1, 10**11, -(10**11), 10**14, 10**17 - 1, 10**17, 2**62 - 1, 1_600_000_000_123]
    for values in (np.array(whole), np.array(whole, np.float64) + 0.25):
        if values.dtype == np.float64:
            values = values[values < 2**61]
        one, many = Counter(), Counter()
        assert all_seconds(values, many).tolist() == [unix_seconds(value, "", one) for value in values.tolist()]
        assert one == many
    for bad in (np.array([2**62]), np.array([np.nan]), np.array([np.iinfo(np.int64).min])):
        with pytest.raises(ValueError, match="^$"):
            all_seconds(bad, Counter())


def test_codes_stay_in_order_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"u{i % 7}", f"N{i * 5 % NUM_ITEMS}", float(i), i) for i in range(90)]
    monkeypatch.setattr("trsr_dist.data.interactions.MOST_PARTS", 2)
    many, one = Interactions(), Interactions()
    for start in range(0, 90, 9):
        many.add_rows(rows[start : start + 9])
    one.add_rows(rows)
    codes, counts = ItemCodes({f"N{i}": i for i in range(NUM_ITEMS)}, keep_unknown=False), Counter()
    logs = [gather(found.table(codes.of).to_batches(), "", counts) for found in (one, many)]
    users = [[found.users.user(place) for place in range(7)] for found in logs]
    assert users[0] == users[1] and [user.user for user in users[0]] == [f"u{i}" for i in range(7)]
    assert users[0][0].targets == [84 * 5 % NUM_ITEMS] and logs[0].rows[0] == 84
