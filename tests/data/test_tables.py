"""Logs as others keep them: CSV, TSV, Parquet, packed or not, own column names, RecBole, Amazon Reviews 2023."""

import csv
import gzip
import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.raw import NUM_ITEMS, clicks, make_config, write_jsonl
from tests.data.test_prepare import manifest, run, users_of
from trsr_dist.config import load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import ConfigError, DataError

START = 1_700_000_000
USERS = 24
COLUMNS = "data.columns={user: customer, item: sku, time: bought_at, id: sku, category: kind}"
ITEMS = [{"sku": f"N{i}", "title": f'Thing {i}, "new"', "kind": f"c{i % 2}"} for i in range(NUM_ITEMS)]
LOG = [
    {"customer": f"u{user}", "sku": item, "bought_at": START + 100 * user + k}
    for user in range(USERS)
    for k, item in reversed(list(enumerate(clicks(user))))
]


def as_text(path: Path, rows: list[dict[str, Any]], delimiter: str) -> None:
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def as_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Times as Arrow's own type, ids as a dictionary, as pandas writes categories."""
    table = pa.Table.from_pylist(rows)
    for place, name in enumerate(table.column_names):
        if name == "bought_at":
            times = [datetime.fromtimestamp(row["bought_at"], UTC) for row in rows]
            table = table.set_column(place, name, pa.array(times, pa.timestamp("ms", "UTC")))
        elif name == "sku":
            table = table.set_column(place, name, table[name].dictionary_encode())
    pq.write_table(table, path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".csv": lambda path, rows: as_text(path, rows, ","),
    ".tsv": lambda path, rows: as_text(path, rows, "\t"),
    ".jsonl": as_json,
    ".parquet": as_parquet,
}


def raw_folder(folder: Path) -> Path:
    raw = folder / "raw_files"
    raw.mkdir()
    return raw


def write_tables(folder: Path, ending: str, pack: str = "") -> Path:
    raw = raw_folder(folder)
    for name, rows in (("items", ITEMS), ("interactions", LOG)):
        path = raw / f"{name}{ending}"
        WRITERS[ending](path, rows)
        if pack:
            content = path.read_bytes()
            packed = gzip.compress(content) if pack == ".gz" else pa.compress(content, "zstd", asbytes=True)
            path.rename(path.with_name(path.name + pack)).write_bytes(packed)
    return raw


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> HistoryStore:
    """The same log in our own names."""
    folder = tmp_path_factory.mktemp("own")
    log = [{"user": row["customer"], "item": row["sku"], "time": row["bought_at"]} for row in LOG]
    items = [{"id": row["sku"], "title": row["title"], "category": row["kind"]} for row in ITEMS]
    write_jsonl(folder, log, items)
    return run(folder, "jsonl", "data.item_fields=[title]", "data.candidates=category")


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".csv", ""), (".csv", ".gz"), (".tsv", ".zst"), (".jsonl", ".zst"), (".jsonl", ".gz"), (".parquet", "")],
)
def test_a_table_with_own_names(tmp_path: Path, expected: HistoryStore, ending: str, pack: str) -> None:
    write_tables(tmp_path, ending, pack)
    store = run(tmp_path, "table", COLUMNS, "data.item_fields=[title]", "data.candidates=category")
    assert users_of(store) == users_of(expected)
    assert [store.catalogue.text(i) for i in range(3)] == [expected.catalogue.text(i) for i in range(3)]
    assert set(manifest(tmp_path)["inputs"]) == {f"items{ending}{pack}", f"interactions{ending}{pack}"}


def test_users_in_one_row_come_from_parquet_too(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path)
    as_parquet(raw / "products.parquet", ITEMS)
    rows = [{"uid": i, "past": clicks(i)[:-1], "next": clicks(i)[-1]} for i in range(USERS)]
    as_parquet(raw / "log.parquet", rows)
    names = "data.columns={user: uid, history: past, target: next, id: sku}"
    store = run(tmp_path, "table", names, "data.items_file=products.parquet", "data.interactions_file=log.parquet")
    _, row = users_of(store)["3"]
    assert [store.catalogue.id(item) for item in row.history] == clicks(3)[:-1]
    assert store.catalogue.text(2) == 'title: Thing 2, "new"; kind: c0'


def test_recbole_atomic_files(tmp_path: Path) -> None:
    """As ml-100k is published: types in the header, tabs, no quoting."""
    raw = raw_folder(tmp_path)
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"]
    items += [f"{i}\tToy \"Story {i}\t{1990 + i % 9}\tAnimation Children's\n" for i in range(NUM_ITEMS)]
    log = ["user_id:token\titem_id:token\trating:float\ttimestamp:float\n"]
    log += [f"{user}\t{item[1:]}\t3\t{881250949 + k}\n" for user in range(USERS) for k, item in enumerate(clicks(user))]
    (raw / "ml-100k.item").write_text("".join(items))
    (raw / "ml-100k.inter").write_text("".join(log))
    store = run(tmp_path, "recbole")
    _, row = users_of(store)["5"]
    assert [f"N{store.catalogue.id(item)}" for item in row.history] == clicks(5)[:-1]
    assert store.catalogue.text(1) == "movie_title: Toy \"Story 1; release_year: 1991; class: Animation Children's"


def test_amazon_reviews_2023(tmp_path: Path) -> None:
    """Reviews and meta of one category, with the fields that are published."""
    raw = raw_folder(tmp_path)
    reviews = [
        {
            "rating": 5.0, "title": "Such a lovely scent", "text": "Nice.", "images": [], "asin": f"V{item}",
            "parent_asin": item, "user_id": f"AGK{user}", "timestamp": (START + k) * 1000 + 7, "helpful_vote": 0,
            "verified_purchase": True,
        }
        for user in range(USERS)
        for k, item in enumerate(clicks(user))
    ]  # fmt: skip
    meta = [
        {
            "main_category": "All Beauty", "title": f"Lotion {i}", "average_rating": 4.8, "rating_number": 10,
            "features": [], "description": [], "price": None, "images": [{"thumb": "https://x", "variant": "MAIN"}],
            "videos": [], "store": "Howard" if i % 2 else None, "categories": ["Beauty", "Body"] if i % 3 else [],
            "details": {"Package Dimensions": "7 x 5"}, "parent_asin": f"N{i}", "bought_together": None,
        }
        for i in range(NUM_ITEMS)
    ]  # fmt: skip
    for name, rows in (("All_Beauty.jsonl.gz", reviews), ("meta_All_Beauty.jsonl.gz", meta)):
        (raw / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    store = run(tmp_path, "amazon_reviews")
    _, row = users_of(store)["AGK7"]
    assert [store.catalogue.id(item) for item in row.history] == clicks(7)[:-1]
    assert store.catalogue.text(0) == "title: Lotion 0"
    assert store.catalogue.text(1) == "title: Lotion 1; store: Howard; categories: Beauty, Body"
    assert manifest(tmp_path)["counts"]["times_in_milliseconds"] == len(reviews)


def lines_end(path: Path, text: str) -> None:
    with open(path, "a") as stream:
        stream.write(text)


BAD: dict[str, tuple[str, Callable[[Path], object], list[str], str]] = {
    "no mapping": (
        ".csv", lambda raw: None, [],
        r"items\.csv:2: no field 'id'; found sku, title, kind; add it, or name yours with data\.columns",
    ),
    "a column that is not there": (
        ".parquet", lambda raw: None, [COLUMNS.replace("customer", "client")],
        r"interactions\.parquet:1: no field 'client'; found customer, sku, bought_at;",
    ),
    "neither kind of rows": (
        ".csv", lambda raw: None, [COLUMNS.replace("item: sku", "item: article")],
        r"interactions\.csv:2: fields customer, sku, bought_at; expected customer, article, bought_at or",
    ),
    "a short row": (
        ".tsv", lambda raw: lines_end(raw / "interactions.tsv", "u9\n"), [COLUMNS],
        r"interactions\.tsv:146: 1 columns, expected 3 \(customer, sku, bought_at\)",
    ),
    "a time that is none": (
        ".csv", lambda raw: lines_end(raw / "interactions.csv", "u9,N1,soon\n"), [COLUMNS],
        r"interactions\.csv:146: time 'soon', expected Unix seconds or ISO 8601",
    ),
    "a quotation mark over two rows": (
        ".tsv", lambda raw: lines_end(raw / "items.tsv", 'N60\t"Heroes\tc0\nN61\tVillains"\tc1\n'), [COLUMNS],
        r"items\.tsv:62: a quotation mark that opens here closes in line 63, .*remove or double the mark",
    ),
    "a list as text": (
        ".csv", lambda raw: None, [COLUMNS.replace("item: sku", "history: sku, target: sku")],
        r"interactions\.csv:2: sku is 'N\d+', expected a list of ids",
    ),
    "a damaged Parquet file": (
        ".parquet", lambda raw: (raw / "items.parquet").write_bytes(b"PAR1 and no more"), [COLUMNS],
        r"items\.parquet: cannot be read beyond row 0 .*copy or download the file again",
    ),
    "JSON lines under another name": (
        ".jsonl", lambda raw: (raw / "items.jsonl").rename(raw / "items.parquet"), [COLUMNS],
        r"items\.parquet: cannot be read beyond row 0",
    ),
    "no file": (
        ".csv", lambda raw: (raw / "items.csv").unlink(), [COLUMNS],
        r"items\.\*: missing \(found there: interactions\.csv\)",
    ),
    "two files": (
        ".csv", lambda raw: (raw / "items.tsv").touch(), [COLUMNS],
        r"items\.csv, items\.tsv may all be meant; name one with data\.items_file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_named(tmp_path: Path, case: str) -> None:
    ending, edit, settings, message = BAD[case]
    edit(write_tables(tmp_path, ending))
    with pytest.raises((DataError, ConfigError), match=message):
        prepare(make_config(tmp_path, "table", *settings))


def test_columns_are_of_formats_that_have_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.columns is for data\.format=jsonl, table, recbole, amazon_reviews"):
        prepare(make_config(tmp_path, "mind", "data.columns={user: u}"))
    with pytest.raises(ConfigError, match=r"data\.columns='usr': Input should be 'user', 'item'"):
        load_config("configs/jsonl.yaml", ["data.columns={usr: u}"])


def test_columns_that_pandas_writes_are_no_texts_and_its_types_are_read(tmp_path: Path) -> None:
    """Row numbers without or with a name of pandas' own, bytes, dates and times to the nanosecond."""
    raw = raw_folder(tmp_path)
    odd = {"": range(NUM_ITEMS), "Unnamed: 0": range(NUM_ITEMS), "__index_level_0__": range(NUM_ITEMS)}
    items = pa.table({
        **odd,
        "sku": [f"N{i}" for i in range(NUM_ITEMS)],
        "title": pa.array([f"Thing {i}".encode() for i in range(NUM_ITEMS)]),
        "day": pa.array([date(2024, 1, 1 + i % 20) for i in range(NUM_ITEMS)]),
    })  # fmt: skip
    pq.write_table(items, raw / "items.parquet")
    log = pa.Table.from_pylist(LOG)
    times = pa.array([row["bought_at"] * 10**9 + 1 for row in LOG], pa.timestamp("ns"))
    pq.write_table(log.set_column(2, "bought_at", times), raw / "interactions.parquet")
    store = run(tmp_path, "table", COLUMNS)
    assert store.catalogue.text(3) == "title: Thing 3; day: 2024-01-04"
    _, row = users_of(store)["u7"]
    assert [store.catalogue.id(item) for item in row.history] == clicks(7)[:-1]


@pytest.mark.parametrize("kind", ["date", "day", "number", "text"])
def test_dates_are_times(tmp_path: Path, kind: str) -> None:
    """As Arrow's type in columns and beside a row that is not as usual, and as 20240131120000."""
    raw = write_tables(tmp_path, ".parquet")
    places = [day for _ in range(USERS) for day in range(len(clicks(0)))][::-1]
    days = [datetime(2024, 1, 1 + place, 12, tzinfo=UTC) for place in places]
    log = pa.table({"customer": [row["customer"] for row in LOG], "sku": [row["sku"] for row in LOG]})
    compact = [f"{day:%Y%m%d%H%M%S}" for day in days]
    column = {"number": pa.array(map(int, compact)), "text": pa.array(compact)}.get(kind, pa.array(days, pa.date32()))
    if kind == "day":  # an id with a blank among them: the rows are read one by one
        log = log.set_column(1, "sku", pa.array([f"{row['sku']} " for row in LOG]))
    pq.write_table(log.append_column("bought_at", column), raw / "interactions.parquet")
    _, row = users_of(run(tmp_path, "table", COLUMNS))["u7"]
    hour = 0 if kind in ("date", "day") else 12
    assert row.time == datetime(2024, 1, len(clicks(0)), hour, tzinfo=UTC).timestamp()


def test_settings_of_other_formats_are_refused(tmp_path: Path) -> None:
    for setting in ("data.locale=UK", "data.behaviors_file=b.tsv", "data.sessions_file=s.csv"):
        with pytest.raises(ConfigError, match=rf"{setting.partition('=')[0]} is for data\.format=.*, not for table"):
            prepare(make_config(tmp_path, "table", setting))


@pytest.mark.parametrize("name", ["items", "interactions"])
def test_a_doubled_column_of_parquet_is_refused(tmp_path: Path, name: str) -> None:
    """Arrow reads both, Python's records would hold the last one alone."""
    tables = {
        "items": {"id": ["a", "b"], "title": ["A", "B"]},
        "interactions": {"user": ["u", "u"], "item": ["a", "b"], "time": [9, 10]},
    }
    raw = tmp_path / "raw_files"
    raw.mkdir()
    for kind, columns in tables.items():
        table = pa.table(columns)
        twice = table.append_column("title" if kind == "items" else "item", [["b", "a"]]) if kind == name else table
        pq.write_table(twice, raw / f"{kind}.parquet")
    with pytest.raises(DataError, match=rf"{name}\.parquet: column '(title|item)' stands twice; remove or rename one"):
        prepare(make_config(tmp_path, "table"))


def test_a_doubled_field_of_recbole_is_refused(tmp_path: Path) -> None:
    """Its two columns differ by their types alone, which are no part of a field's name."""
    raw = tmp_path / "raw_files"
    raw.mkdir()
    (raw / "x.item").write_text("item_id:token\ttitle:token_seq\ttitle:token\na\tA\tB\n")
    (raw / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ta\t881250949\n")
    with pytest.raises(DataError, match=r"x\.item:1: column 'title' stands twice"):
        prepare(make_config(tmp_path, "recbole"))
